package guard

import (
	"net/netip"
	"runtime"
	"strings"
	"testing"

	"kalium.dev/kalium/runtime/internal/policy"
)

func TestConnectionsWithTheOutsideAreBounded(t *testing.T) {
	for _, mode := range []string{"enforce", "audit"} {
		g, c := newGuard(t, mode)
		for i := range connectionsMax {
			if i%2 == 0 {
				accept(t, g)
			} else {
				connect(t, g, api)
			}
		}

		if _, outcome := g.Connect(netip.MustParseAddrPort(api)); outcome != Denied {
			t.Error("one more connection to a peer")
		}
		lastReason(t, c, policy.ReasonRateBound)
		if _, outcome := g.Accept(8080, client); outcome != Denied {
			t.Error("one more connection from outside")
		}
		lastReason(t, c, policy.ReasonRateBound)

		g.Leave()
		connect(t, g, api)
		if _, outcome := g.Accept(8080, client); outcome != Denied {
			t.Error("two more connections for one that left")
		}
	}
}

func TestOffHasNoBoundOfConnections(t *testing.T) {
	g, _ := newGuard(t, "off")
	for range connectionsMax + 10 {
		connect(t, g, "10.9.9.9:9")
	}
	setPolicy(t, g, "enforce", "4")

	if _, outcome := g.Connect(netip.MustParseAddrPort(api)); outcome != Denied {
		t.Error("a connection beyond the bound")
	}
	for range 11 {
		g.Leave()
	}
	connect(t, g, api)
}

// What a head of 1 KiB costs that never becomes whole: one buffer of the pool, on as many connections as there may be.
func TestConnectionsThatHoldAnUnfinishedHeadStayWithinTheirMemory(t *testing.T) {
	g, _, _ := invoked(t, "enforce")
	head := []byte("GET /a HTTP/1.1\r\nHost: api.test:8080\r\nX-Slow: " + strings.Repeat("x", 1<<10))
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	all := make([]*Outgoing, connectionsMax-1) // one is the request's

	for i := range all {
		all[i] = connect(t, g, api)
		for at := 0; at < len(head); at += 128 {
			if send, outcome := all[i].Write(head[at:min(at+128, len(head))]); len(send) != 0 || outcome != Allowed {
				t.Fatalf("sent %q, outcome %d", send, outcome)
			}
			all[i].Sent()
		}
	}

	runtime.GC()
	runtime.ReadMemStats(&after)
	runtime.KeepAlive(all)
	if each := (int64(after.HeapAlloc) - int64(before.HeapAlloc)) / int64(len(all)); each > bufferBytes+4<<10 {
		t.Errorf("%d bytes for each connection", each)
	}
}

func TestWritesOfOneByteHoldNoMoreThanTheBound(t *testing.T) {
	g, c, _ := invoked(t, "enforce")
	out := connect(t, g, api)
	head := "GET /a HTTP/1.1\r\nHost: api.test:8080\r\nX-Slow: "
	expect(t, out, head, "", Allowed)
	written := len(head)
	for {
		_, outcome := out.Write([]byte("x"))
		if n, _ := out.Held(); n > holdBytesMax {
			t.Fatalf("%d bytes are held", n)
		}
		if written++; outcome == Denied {
			break
		}
		if written > 2*holdBytesMax {
			t.Fatal("there is no bound")
		}
	}
	if r := c.Last(t); r.Reason != "too_large" && r.Reason != "malformed" {
		t.Errorf("verdict %+v", r)
	}
}
