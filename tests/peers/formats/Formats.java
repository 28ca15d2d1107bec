import java.io.IOException;
import java.io.InputStream;
import java.net.InetAddress;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.security.KeyStore;
import java.security.cert.X509Certificate;
import java.util.Collections;
import javax.net.ssl.KeyManagerFactory;
import javax.net.ssl.SSLContext;
import javax.net.ssl.SSLServerSocket;
import javax.net.ssl.SSLSocket;
import javax.net.ssl.TrustManagerFactory;

/** Serves mutual TLS with the PKCS#12 stores of each directory; replies with the serial number of the client. */
public final class Formats {
  public static void main(String[] directories) throws Exception {
    for (String directory : directories) {
      Path path = Path.of(directory);
      char[] password = Files.readString(path.resolve("keystore.password")).toCharArray();
      KeyStore keys = load(path.resolve("keystore.p12"), password);
      KeyStore roots = load(path.resolve("truststore.p12"), password);
      int trusted = 0;
      for (String alias : Collections.list(roots.aliases())) {
        trusted += roots.isCertificateEntry(alias) ? 1 : 0;
      }
      KeyManagerFactory keyManagers = KeyManagerFactory.getInstance("PKIX");
      keyManagers.init(keys, password);
      TrustManagerFactory trustManagers = TrustManagerFactory.getInstance("PKIX");
      trustManagers.init(roots);
      SSLContext context = SSLContext.getInstance("TLS");
      context.init(keyManagers.getKeyManagers(), trustManagers.getTrustManagers(), null);
      SSLServerSocket server = (SSLServerSocket)
          context.getServerSocketFactory().createServerSocket(0, 10, InetAddress.getLoopbackAddress());
      server.setNeedClientAuth(true);
      Thread thread = new Thread(() -> serve(server));
      thread.setDaemon(true);
      thread.start();
      X509Certificate leaf = (X509Certificate) keys.getCertificate("certmount");
      System.out.println(directory + " " + server.getLocalPort() + " " + leaf.getSerialNumber().toString(16) + " " + trusted);
    }
    System.out.println("ready");
    System.in.read();
  }

  private static KeyStore load(Path file, char[] password) throws Exception {
    KeyStore store = KeyStore.getInstance("PKCS12");
    try (InputStream input = Files.newInputStream(file)) {
      store.load(input, password);
    }
    return store;
  }

  private static void serve(SSLServerSocket server) {
    while (true) {
      try (SSLSocket socket = (SSLSocket) server.accept()) {
        X509Certificate client = (X509Certificate) socket.getSession().getPeerCertificates()[0];
        socket.getOutputStream().write(client.getSerialNumber().toString(16).getBytes(StandardCharsets.US_ASCII));
      } catch (IOException failure) {
        System.err.println(failure);
      }
    }
  }
}
