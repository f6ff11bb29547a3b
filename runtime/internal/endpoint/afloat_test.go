package endpoint

import (
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
)

func TestAWriteThatDoesNotEndKeepsNoOther(t *testing.T) {
	n := newNet(t, "enforce")
	n.working()
	listener := n.plain(tcp.ProtocolNumber).listen(peerServer)
	defer listener.Close()
	stuck := n.stream().connect(peerServer)
	defer stuck.Close()
	listener.accept() // before there is another one: two that come at once are accepted in any order
	free := n.stream().connect(peerServer)
	defer free.Close()
	server := listener.accept()
	free.write(getA)
	lock := &stuck.Endpoint.(*Stream).write
	lock.Lock()
	ended := make(chan struct{})

	go func() {
		EndWriting()
		close(ended)
	}()

	select {
	case <-ended:
	case <-time.After(wait):
		t.Error("it waits for the write")
	}
	if got, how := server.end(); got != getA || !isEOF(how) {
		t.Errorf("%q arrived, and %v", got, how)
	}
	if Unsettled() == 0 {
		t.Error("the write that does not end is settled")
	}
	lock.Unlock()
	n.eventually("the end of the other", func() bool { return !connected(stuck.State()) })
}
