import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpResponse;
import java.time.Duration;

/** One HTTPS request by Java's own client: prints the answer, or an error and exits 1. */
public class JavaClient {
    public static void main(String[] arguments) {
        try {
            HttpClient client = HttpClient.newBuilder().connectTimeout(Duration.ofSeconds(60)).build();
            HttpRequest request = HttpRequest.newBuilder(URI.create(arguments[0])).timeout(Duration.ofSeconds(60)).build();
            System.out.println(client.send(request, HttpResponse.BodyHandlers.ofString()).body());
        } catch (Exception error) {
            System.err.println(error);
            System.exit(1);
        }
    }
}
