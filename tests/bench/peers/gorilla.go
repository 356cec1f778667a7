// gorilla PORT room|echo: the peer for gorilla/websocket, based on its chat example: per connection a goroutine that
// reads and one that writes, and a prepared message per broadcast.
package main

import (
	"fmt"
	"net"
	"net/http"
	"os"
	"sync"

	"github.com/gorilla/websocket"
)

type member struct {
	conn *websocket.Conn
	send chan *websocket.PreparedMessage
}

var (
	upgrader = websocket.Upgrader{CheckOrigin: func(*http.Request) bool { return true }}
	lock     sync.Mutex
	room     = map[*member]bool{}
)

func leave(m *member) {
	lock.Lock()
	defer lock.Unlock()
	if room[m] {
		delete(room, m)
		close(m.send)
	}
}

func broadcast(kind int, data []byte) {
	message, err := websocket.NewPreparedMessage(kind, data)
	if err != nil {
		return
	}
	lock.Lock()
	defer lock.Unlock()
	for m := range room {
		select {
		case m.send <- message:
		default: // too slow
			delete(room, m)
			close(m.send)
		}
	}
}

func (m *member) write() {
	defer m.conn.Close()
	for message := range m.send {
		if m.conn.WritePreparedMessage(message) != nil {
			return
		}
	}
}

func serveRoom(conn *websocket.Conn) {
	m := &member{conn, make(chan *websocket.PreparedMessage, 256)}
	lock.Lock()
	room[m] = true
	lock.Unlock()
	go m.write()
	defer leave(m)
	for {
		kind, data, err := conn.ReadMessage()
		if err != nil {
			return
		}
		broadcast(kind, data)
	}
}

func serveEcho(conn *websocket.Conn) {
	defer conn.Close()
	for {
		kind, data, err := conn.ReadMessage()
		if err != nil || conn.WriteMessage(kind, data) != nil {
			return
		}
	}
}

func main() {
	if len(os.Args) < 3 {
		fmt.Fprintln(os.Stderr, "usage: gorilla PORT room|echo")
		os.Exit(1)
	}
	serve := serveRoom
	if os.Args[2] == "echo" {
		serve = serveEcho
	}
	listener, err := net.Listen("tcp", "127.0.0.1:"+os.Args[1]) // Go sets TCP_NODELAY on every connection
	if err != nil {
		fmt.Fprintln(os.Stderr, "gorilla:", err)
		os.Exit(1)
	}
	fmt.Println("gorilla: listening on", listener.Addr())
	err = http.Serve(listener, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if conn, err := upgrader.Upgrade(w, r, nil); err == nil {
			serve(conn)
		}
	}))
	fmt.Fprintln(os.Stderr, "gorilla:", err)
	os.Exit(1)
}
