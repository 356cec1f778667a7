// An echo server with Apache Tomcat, for client_test.py: prints its port. See client_servers.mjs for its commands.
//
//   java -cp '/usr/share/java/*' tests/interop/ClientServer.java [deflate]

import java.io.IOException;
import java.nio.ByteBuffer;
import java.nio.file.Files;
import java.util.List;
import java.util.Set;
import java.util.logging.Level;
import java.util.logging.Logger;
import javax.servlet.ServletContext;
import javax.servlet.ServletException;
import javax.websocket.CloseReason;
import javax.websocket.DeploymentException;
import javax.websocket.Endpoint;
import javax.websocket.EndpointConfig;
import javax.websocket.Extension;
import javax.websocket.PongMessage;
import javax.websocket.Session;
import javax.websocket.server.ServerContainer;
import javax.websocket.server.ServerEndpointConfig;
import org.apache.catalina.Context;
import org.apache.catalina.Wrapper;
import org.apache.catalina.connector.Connector;
import org.apache.catalina.servlets.DefaultServlet;
import org.apache.catalina.startup.Tomcat;
import org.apache.tomcat.websocket.server.WsSci;

public class ClientServer {
    static boolean deflate = false;

    public static class Echo extends Endpoint {
        @Override
        public void onOpen(Session session, EndpointConfig config) {
            session.setMaxTextMessageBufferSize(1 << 26);
            session.setMaxBinaryMessageBufferSize(1 << 26);
            session.addMessageHandler(String.class, text -> answer(session, text));
            session.addMessageHandler(PongMessage.class, pong -> {
                byte[] data = new byte[pong.getApplicationData().remaining()];
                pong.getApplicationData().get(data);
                send(session, "pong " + new String(data));
            });
        }

        static void answer(Session session, String text) {
            try {
                if (text.startsWith("close ")) {
                    String[] words = text.split(" ");
                    int code = Integer.parseInt(words[1]);
                    session.close(new CloseReason(CloseReason.CloseCodes.getCloseCode(code), words[2]));
                } else if (text.equals("ping")) {
                    session.getBasicRemote().sendPing(ByteBuffer.wrap("payload".getBytes()));
                } else if (text.equals("extensions")) {
                    StringBuilder names = new StringBuilder();
                    for (Extension each : session.getNegotiatedExtensions()) names.append(each.getName());
                    send(session, "extensions: " + names + " protocol: " + session.getNegotiatedSubprotocol());
                } else {
                    send(session, text);
                }
            } catch (IOException gone) {
                // The client has hung up.
            }
        }

        static void send(Session session, String text) {
            try {
                session.getBasicRemote().sendText(text);
            } catch (IOException gone) {
                // The client has hung up.
            }
        }
    }

    public static class Extensions extends ServerEndpointConfig.Configurator {
        @Override
        public List<Extension> getNegotiatedExtensions(List<Extension> installed, List<Extension> requested) {
            return deflate ? super.getNegotiatedExtensions(installed, requested) : List.of();
        }
    }

    static void addEcho(Set<Class<?>> classes, ServletContext context) throws ServletException {
        new WsSci().onStartup(classes, context);
        ServerContainer container = (ServerContainer) context.getAttribute("javax.websocket.server.ServerContainer");
        try {
            container.addEndpoint(ServerEndpointConfig.Builder.create(Echo.class, "/")
                    .subprotocols(List.of("two")).configurator(new Extensions()).build());
        } catch (DeploymentException error) {
            throw new ServletException(error);
        }
    }

    public static void main(String[] arguments) throws Exception {
        deflate = arguments.length > 0 && arguments[0].equals("deflate");
        Logger.getLogger("").setLevel(Level.SEVERE);
        Tomcat tomcat = new Tomcat();
        tomcat.setBaseDir(Files.createTempDirectory("wschat-tomcat").toString());
        Connector connector = new Connector();
        connector.setPort(0);
        connector.setProperty("address", "127.0.0.1");
        tomcat.setConnector(connector);
        Context context = tomcat.addContext("", null);
        context.setParentClassLoader(ClientServer.class.getClassLoader());
        context.addServletContainerInitializer(ClientServer::addEcho, Set.of());
        Wrapper servlet = Tomcat.addServlet(context, "default", new DefaultServlet());
        context.addServletMappingDecoded("/", servlet.getName());
        tomcat.start();
        System.out.println(connector.getLocalPort());
        tomcat.getServer().await();
    }
}
