import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpResponse;
import javax.net.ssl.SSLContext;

/** Uses the files as the server does: {@link Server#newest()} loads them once for each generation. */
public class Client {
  static SSLContext loaded;
  static HttpClient client;

  /** Returns a client with the newest files. An HttpClient keeps its SSLContext, so each generation needs another one. */
  static HttpClient newest() throws Exception {
    SSLContext context = Server.newest();
    if (context != loaded) {
      client = HttpClient.newBuilder().version(HttpClient.Version.HTTP_1_1).sslContext(context).build();
      loaded = context;
    }
    return client;
  }

  public static void main(String[] arguments) throws Exception {
    HttpRequest request = HttpRequest.newBuilder(URI.create(arguments[0])).build();
    while (true) {
      try {
        System.out.print(newest().send(request, HttpResponse.BodyHandlers.ofString()).body());
      } catch (Exception error) {
        System.out.println("error: " + error);
      }
      Thread.sleep(1000);
    }
  }
}
