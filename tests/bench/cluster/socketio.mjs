// The same as node.cpp with Socket.IO: every message goes to every connection of all nodes.
//
//   node socketio.mjs PORT REDIS redis|streams FOLDER
//
// FOLDER has the packages socket.io, redis and the adapter: @socket.io/redis-adapter or @socket.io/redis-streams-adapter.
import { createServer } from "node:http";
import { createRequire } from "node:module";

const [port, url, adapter, folder] = process.argv.slice(2);
const require = createRequire(`${folder}/package.json`);
const { Server } = require("socket.io");
const { createClient } = require("redis");

const client = createClient({ url });
await client.connect();
const options = { transports: ["websocket"], perMessageDeflate: false, serveClient: false };
if (adapter === "streams") {
  const { createAdapter } = require("@socket.io/redis-streams-adapter");
  options.adapter = createAdapter(client, { maxLen: 10_000_000 });
  options.connectionStateRecovery = {}; // otherwise the streams bring nothing
} else {
  const { createAdapter } = require("@socket.io/redis-adapter");
  const subscriber = client.duplicate();
  await subscriber.connect();
  options.adapter = createAdapter(client, subscriber);
}
const http = createServer();
const io = new Server(http, options);
io.on("connection", (socket) => {
  socket.join("all");
  socket.on("m", (text) => io.to("all").emit("m", text));
});
http.listen(Number(port), "127.0.0.1", () => console.log(`socketio: http://127.0.0.1:${http.address().port}/`));
process.on("SIGTERM", () => process.exit(0));
