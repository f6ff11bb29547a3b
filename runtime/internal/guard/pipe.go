package guard

import (
	"bytes"
	"io"
	"sync"
)

// pipeBytes is how full a pipe gets. One write may go beyond it.
const pipeBytes = 64 << 10

// pipe carries bytes from one who writes to one who reads. Either side may be one that cannot wait, and asks for room or
// for bytes first.
type pipe struct {
	mu     sync.Mutex
	change sync.Cond
	b      bytes.Buffer
	end    error // behind the bytes; nil while more may come
	deaf   bool  // nobody reads any more: what is written is thrown away
}

func newPipe() *pipe {
	p := &pipe{}
	p.change.L = &p.mu
	return p
}

func (p *pipe) size() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.b.Len()
}

// hasRoom tells that a write will be taken without waiting.
func (p *pipe) hasRoom() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.b.Len() < pipeBytes || p.end != nil || p.deaf
}

// state tells what a reader would find.
func (p *pipe) state() (n int, end error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.b.Len(), p.end
}

// put takes all of b. With wait it waits for room first.
func (p *pipe) put(b []byte, wait bool) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	for wait && p.b.Len() >= pipeBytes && p.end == nil && !p.deaf {
		p.change.Wait()
	}
	switch {
	case p.deaf:
		return nil
	case p.end != nil:
		return io.ErrClosedPipe
	}
	p.b.Write(b)
	p.change.Broadcast()
	return nil
}

// show gives what is there to look, which says how much of it it has taken. Without wait there may be nothing: n is 0 then,
// and err is nil.
func (p *pipe) show(wait, take bool, look func([]byte) int) (n int, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for wait && p.b.Len() == 0 && p.end == nil {
		p.change.Wait()
	}
	if p.b.Len() == 0 {
		return 0, p.end
	}
	n = look(p.b.Bytes())
	if take {
		p.b.Next(n)
	}
	if p.b.Len() == 0 {
		p.b = bytes.Buffer{} // idle connections hold no memory
	}
	p.change.Broadcast()
	return n, nil
}

// finish says that nothing follows what was written. The first word counts.
func (p *pipe) finish(end error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.end == nil {
		p.end = end
	}
	p.change.Broadcast()
}

// ignore says that nobody reads any more.
func (p *pipe) ignore() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.deaf = true
	p.b = bytes.Buffer{}
	p.change.Broadcast()
}

// drop is finish that also forgets what was written.
func (p *pipe) drop(end error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.b, p.end = bytes.Buffer{}, end
	p.change.Broadcast()
}
