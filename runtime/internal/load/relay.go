package load

import (
	"encoding/binary"
	"net"
	"sync"

	"kalium.dev/kalium/runtime/internal/frame"
)

// Relay does with frames what an agent cannot do without: it takes them from the connections of a listener, gives each
// question an id of its own, writes it to the one connection to target, and brings the answer back. Nothing is decoded.
// It is the floor of an app edge: the same two hops without anything of ours on them.
func Relay(listener net.Listener, target Target) error {
	conn, err := target.dial()
	if err != nil {
		return err
	}
	defer conn.Close()
	r := &relay{up: conn, waiting: map[uint32]origin{}}
	go r.accept(listener)
	w := newWire(conn)
	for {
		if err := w.readForever(r.answer); err != nil {
			return err
		}
	}
}

type origin struct {
	conn net.Conn
	id   uint32
}

type relay struct {
	mu      sync.Mutex // guards all of the following, and keeps frames whole
	up      net.Conn
	last    uint32
	waiting map[uint32]origin
}

func (r *relay) accept(listener net.Listener) {
	for {
		conn, err := listener.Accept()
		if err != nil {
			return // the listener was closed
		}
		go func() {
			defer conn.Close()
			w := newWire(conn)
			for w.readForever(func(raw []byte) error { return r.question(conn, raw) }) == nil {
			}
		}()
	}
}

func (r *relay) question(conn net.Conn, raw []byte) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if id := binary.BigEndian.Uint32(raw[4:]); id != 0 {
		r.last++
		r.waiting[r.last] = origin{conn, id}
		binary.BigEndian.PutUint32(raw[4:], r.last)
	}
	_, err := r.up.Write(raw)
	return err
}

func (r *relay) answer(raw []byte) error {
	if raw[3] != byte(frame.TypeAnswer) {
		return nil
	}
	id := binary.BigEndian.Uint32(raw[4:])
	r.mu.Lock()
	asked, ok := r.waiting[id]
	delete(r.waiting, id)
	r.mu.Unlock()
	if !ok {
		return nil
	}
	binary.BigEndian.PutUint32(raw[4:], asked.id)
	_, err := asked.conn.Write(raw)
	return err
}
