import java.io.InputStream;
import java.net.ServerSocket;
import java.net.Socket;
import java.nio.file.Files;
import java.nio.file.Path;
import java.security.KeyStore;
import java.security.cert.X509Certificate;
import java.util.concurrent.Executors;
import javax.net.ssl.KeyManagerFactory;
import javax.net.ssl.SSLContext;
import javax.net.ssl.SSLSocket;
import javax.net.ssl.TrustManagerFactory;

public class Server {
  static final Path TLS = Path.of("/var/run/tls");
  static Path generation;
  static SSLContext context;

  static KeyStore load(Path file, char[] password) throws Exception {
    KeyStore store = KeyStore.getInstance("PKCS12");
    try (InputStream content = Files.newInputStream(file)) {
      store.load(content, password);
    }
    return store;
  }

  /** Loads the files once for each generation. */
  static synchronized SSLContext newest() throws Exception {
    Path current = TLS.resolve(Files.readSymbolicLink(TLS.resolve("..data")));
    if (!current.equals(generation)) {
      char[] password = Files.readString(current.resolve("keystore.password")).toCharArray();
      KeyManagerFactory keys = KeyManagerFactory.getInstance("PKIX");
      keys.init(load(current.resolve("keystore.p12"), password), password);
      TrustManagerFactory roots = TrustManagerFactory.getInstance("PKIX");
      roots.init(load(current.resolve("truststore.p12"), password));
      context = SSLContext.getInstance("TLS");
      context.init(keys.getKeyManagers(), roots.getTrustManagers(), null);
      generation = current;
    }
    return context;
  }

  /** Returns the SPIFFE ID, the only URI of the certificate. */
  static Object identity(X509Certificate client) throws Exception {
    client.checkValidity(); // when a session is resumed, Java does not verify the certificate again
    return client.getSubjectAlternativeNames().stream().filter(name -> name.get(0).equals(6)).findFirst().get().get(1);
  }

  static void serve(Socket socket) {
    try (SSLSocket tls = (SSLSocket) newest().getSocketFactory().createSocket(socket, (InputStream) null, true)) {
      tls.setSoTimeout(10_000);
      tls.setNeedClientAuth(true);
      tls.getInputStream().read(new byte[4096]);
      Object client = identity((X509Certificate) tls.getSession().getPeerCertificates()[0]);
      String response = "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nhello " + client + "\n";
      tls.getOutputStream().write(response.getBytes());
    } catch (Exception error) {
      System.err.println(error);
    }
  }

  public static void main(String[] arguments) throws Exception {
    var threads = Executors.newCachedThreadPool();
    try (ServerSocket server = new ServerSocket(8443)) {
      while (true) {
        Socket socket = server.accept();
        threads.execute(() -> serve(socket));
      }
    }
  }
}
