package load

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"sync"
	"time"

	"kalium.dev/kalium/runtime/internal/frame"
)

// errGone means that the guard's connection has ended: as a sandbox's, it is never made again.
var errGone = errors.New("the agent is gone")

// guard is the connection of one instance, over which many invocations ask.
type guard struct {
	agent, app, function, container string

	// one is held while a start or an awaited end is asked about: an instance works on one request at a time, and the
	// answers to so many starts alone are remembered for it.
	one sync.Mutex

	conn net.Conn
	mu   sync.Mutex
	last uint32
	open map[uint32]chan *frame.Answer // nil when the connection has ended
}

// newGuard registers an instance at the agent in folder and says hello as its guard.
func newGuard(folder, app, function, container string) (*guard, error) {
	if err := tellAgent(folder, map[string]string{"op": "register", "container": container, "app": app, "function": function, "image": "soak"}); err != nil {
		return nil, err
	}
	conn, err := net.DialTimeout("unix", filepath.Join(folder, "guard"), dialTimeout)
	if err != nil {
		return nil, err
	}
	w := newWire(conn)
	answer, err := w.ask(1, &frame.Hello{Protos: frame.Protos(), Container: container, App: app, Function: function})
	if err == nil {
		if welcome, ok := answer.(*frame.Welcome); !ok || !welcome.OK {
			err = fmt.Errorf("the welcome of %s: %+v", container, answer)
		}
	}
	if err != nil {
		conn.Close()
		return nil, err
	}
	if err := conn.SetReadDeadline(time.Time{}); err != nil { // asking has set one
		conn.Close()
		return nil, err
	}
	g := &guard{agent: filepath.Base(folder), app: app, function: function, container: container, conn: conn, last: 1, open: map[uint32]chan *frame.Answer{}}
	go g.listen(w)
	return g, nil
}

// tellAgent says one line of an engine to the agent, and fails when it is refused.
func tellAgent(folder string, line map[string]string) error {
	conn, err := net.DialTimeout("unix", filepath.Join(folder, "register"), dialTimeout)
	if err != nil {
		return err
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(2 * dialTimeout)); err != nil {
		return err
	}
	if err := json.NewEncoder(conn).Encode(line); err != nil {
		return err
	}
	text, err := bufio.NewReader(conn).ReadBytes('\n')
	if err != nil {
		return err
	}
	var answer struct {
		OK            bool
		Error, Detail string
	}
	if err := json.Unmarshal(text, &answer); err != nil {
		return err
	}
	if !answer.OK {
		return fmt.Errorf("%s of %s: %s: %s", line["op"], line["container"], answer.Error, answer.Detail)
	}
	return nil
}

func (g *guard) listen(w *wire) {
	for w.readForever(g.heard) == nil {
	}
	g.conn.Close()
	g.mu.Lock()
	open := g.open
	g.open = nil
	g.mu.Unlock()
	for _, waiting := range open {
		close(waiting)
	}
}

func (g *guard) heard(raw []byte) error {
	if raw[3] != byte(frame.TypeAnswer) {
		return nil
	}
	id, m, _, err := frame.Decode(raw)
	if err != nil {
		return err
	}
	g.mu.Lock()
	waiting := g.open[id]
	delete(g.open, id)
	g.mu.Unlock()
	if waiting == nil {
		return fmt.Errorf("an answer with id %d, which was not asked", id)
	}
	waiting <- m.(*frame.Answer)
	return nil
}

func (g *guard) gone() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.open == nil
}

// ask waits for the answer to one question. errGone: there will be none.
func (g *guard) ask(m frame.Message) (*frame.Answer, error) {
	waiting := make(chan *frame.Answer, 1)
	g.mu.Lock()
	if g.open == nil {
		g.mu.Unlock()
		return nil, errGone
	}
	g.last++
	id := g.last
	data, err := frame.Append(nil, id, m)
	if err == nil {
		g.open[id] = waiting
		_, err = g.conn.Write(data)
	}
	g.mu.Unlock()
	if err != nil {
		g.conn.Close()
		return nil, errGone
	}
	answer, ok := <-waiting
	if !ok {
		return nil, errGone
	}
	return answer, nil
}

// tell sends what has no answer.
func (g *guard) tell(m frame.Message) error {
	data, err := frame.Append(nil, 0, m)
	if err != nil {
		return err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.open == nil {
		return errGone
	}
	if _, err := g.conn.Write(data); err != nil {
		g.conn.Close()
		return errGone
	}
	return nil
}
