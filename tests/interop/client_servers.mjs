// An echo server with npm's ws, for client_test.py: prints its port. "close 4001 reason" closes, "ping" sends a ping.
//
//   node tests/interop/client_servers.mjs MODULES [deflate]

import { createRequire } from 'node:module';
import { join, resolve } from 'node:path';

const { WebSocketServer } = createRequire(join(resolve(process.argv[2]), 'here.js'))('ws');
const deflate = process.argv[3] === 'deflate' ? { threshold: 0 } : false;
const server = new WebSocketServer({
  host: '127.0.0.1', port: 0, perMessageDeflate: deflate, maxPayload: 1 << 26,
  handleProtocols: offered => [...offered].pop() ?? false,
});
server.on('connection', socket => {
  socket.on('message', (data, binary) => {
    const text = data.toString();
    if (text.startsWith('close ')) socket.close(Number(text.split(' ')[1]), text.split(' ')[2]);
    else if (text === 'extensions') socket.send(`extensions: ${socket.extensions} protocol: ${socket.protocol}`);
    else if (text === 'ping') socket.ping('payload');
    else socket.send(data, { binary });
  });
  socket.on('pong', data => socket.send(`pong ${data}`));
});
server.on('listening', () => console.log(server.address().port));
