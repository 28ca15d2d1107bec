import java.nio.file.Files;
import java.nio.file.Path;
import java.security.KeyFactory;
import java.security.PrivateKey;
import java.security.spec.InvalidKeySpecException;
import java.security.spec.PKCS8EncodedKeySpec;

/** Reads the key in DER of each directory as Java's API does; prints whether that is possible. */
public final class PrivateKeys {
  public static void main(String[] directories) throws Exception {
    for (String directory : directories) {
      System.out.println(directory + " " + (read(Files.readAllBytes(Path.of(directory, "tls.key.der"))) ? "read" : "rejected"));
    }
  }

  private static boolean read(byte[] der) throws Exception {
    for (String algorithm : new String[] {"EC", "RSA", "Ed25519"}) {
      try {
        PrivateKey key = KeyFactory.getInstance(algorithm).generatePrivate(new PKCS8EncodedKeySpec(der));
        return key != null;
      } catch (InvalidKeySpecException notThis) {
        continue;
      }
    }
    return false;
  }
}
