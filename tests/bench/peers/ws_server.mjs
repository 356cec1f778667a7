// ws_server.mjs PORT room|echo|deflate: the peer for Node's ws, based on the broadcast of its README. deflate: a room
// that compresses; the client chooses context takeover.

import { WebSocketServer } from 'ws';

const [port, mode] = [Number(process.argv[2]), process.argv[3]];
const server = new WebSocketServer({
  host: '127.0.0.1', port, backlog: 4096,  // TCP_NODELAY is ws's own default
  perMessageDeflate: mode === 'deflate' && { threshold: 0, zlibDeflateOptions: { level: 6 } },
});

server.on('connection', (socket) => {
  socket.on('error', () => {});
  socket.on('message', (data, binary) => {
    if (mode === 'echo') {
      socket.send(data, { binary });
    } else {
      for (const client of server.clients) client.send(data, { binary });
    }
  });
});
server.on('listening', () => console.log(`ws: listening on 127.0.0.1:${port}`));
server.on('error', (error) => { console.error(`ws: ${error.message}`); process.exit(1); });
for (const signal of ['SIGINT', 'SIGTERM']) process.on(signal, () => process.exit(0));
