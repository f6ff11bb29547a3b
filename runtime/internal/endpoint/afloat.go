package endpoint

import (
	"sync"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
)

// afloat holds the connections with the outside whose bytes may still be on their way: those that are open, and those that
// were closed while the peer had not acknowledged everything. When the sandbox ends, its network stack ends at once, so
// whoever ends it asks here first.
var afloat = struct {
	sync.Mutex
	streams map[*Stream]struct{}
	prune   int // look for settled ones when there are so many
}{streams: map[*Stream]struct{}{}, prune: pruneMin}

const pruneMin = 64

func (s *Stream) float() {
	afloat.Lock()
	defer afloat.Unlock()
	afloat.streams[s] = struct{}{}
	if len(afloat.streams) < afloat.prune {
		return
	}
	for stream := range afloat.streams {
		if !stream.counted.Load() && stream.settled() {
			delete(afloat.streams, stream)
		}
	}
	afloat.prune = max(pruneMin, 2*len(afloat.streams))
}

// settled tells that the peer has acknowledged all that it will ever get: our FIN too, or there is no connection.
func (s *Stream) settled() bool {
	if s.tx.size() > 0 {
		return false
	}
	switch tcp.EndpointState(s.inner.State()) {
	case tcp.StateEstablished, tcp.StateCloseWait, tcp.StateFinWait1, tcp.StateClosing, tcp.StateLastAck:
		return false
	}
	return true
}

// EndWriting ends the program's side of every connection with the outside, behind what was taken from it. It is for the end
// of the sandbox, and waits for nobody: a write that does not end must not keep the sandbox, nor what the others have taken.
func EndWriting() {
	for _, stream := range connections() {
		go stream.Shutdown(tcpip.ShutdownWrite)
	}
}

// Unsettled counts the connections whose peers have not acknowledged everything.
func Unsettled() (n int) {
	for _, stream := range connections() {
		if !stream.settled() {
			n++
		}
	}
	return n
}

func connections() []*Stream {
	afloat.Lock()
	defer afloat.Unlock()
	list := make([]*Stream, 0, len(afloat.streams))
	for stream := range afloat.streams {
		list = append(list, stream)
	}
	return list
}
