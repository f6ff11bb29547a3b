package endpoint

import (
	"testing"

	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"

	"kalium.dev/kalium/runtime/internal/guard/guardtest"
)

// BenchmarkInvocation and BenchmarkRequest differ by what the guard adds to a request, without the controller's time.
func BenchmarkInvocation(b *testing.B) {
	n := newNet(b, "enforce")
	gateway, program := n.served()
	request(b, gateway, program)
}

func BenchmarkRequest(b *testing.B) {
	n := newNet(b, "")
	listener := n.plain(tcp.ProtocolNumber).listen(inside)
	gateway := n.plain(tcp.ProtocolNumber)
	must(b, gateway.Bind(full(guardtest.HostAddress+":0")))
	gateway.connect(inside)
	request(b, gateway, listener.accept())
}

func request(b *testing.B, gateway, program *peer) {
	b.ReportAllocs()
	for b.Loop() {
		gateway.write(work + "{}")
		program.read(work + "{}")
		program.write(noContent)
		gateway.read(noContent)
	}
}
