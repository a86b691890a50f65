/* A room chat on Node.js and `ws`, as one would write it: what test/bench compares xchat with.
 *
 *     npm install --prefix test/build ws && NODE_PATH=test/build/node_modules node test/peer.js
 *
 * It knows `login` and `say` to all, and nothing else that xchat does; there are no limits. */
const { WebSocketServer } = require('ws');

const rooms = new Map();
const server = new WebSocketServer({ host: '127.0.0.1', port: 0 }, () =>
    console.log(`listening on 127.0.0.1:${server.address().port}`));
const escape = text => text.replace(/&/g, '&amp;').replace(/</g, '&lt;').replace(/>/g, '&gt;').replace(/"/g, '&quot;');

server.on('connection', socket => {
    let room, name;
    socket.on('error', () => {});
    socket.on('close', () => rooms.get(room)?.delete(socket));
    socket.on('message', data => {
        const message = JSON.parse(data);
        const time = new Date().toISOString().slice(0, 19).replace('T', ' ');
        if (message.type === 'login') {
            [room, name] = [message.room_id, escape(message.client_name)];
            if (!rooms.has(room)) rooms.set(room, new Set());
            rooms.get(room).add(socket);
            socket.send(JSON.stringify({ type: 'login', client_name: name, time, client_list: {} }));
        } else if (message.type === 'say') {
            const text = JSON.stringify({ type: 'say', from_client_id: '7f0000011c6800000000', from_client_name: name,
                                          to_client_id: 'all', content: escape(message.content), time });
            for (const member of rooms.get(room)) member.send(text);
        }
    });
});
