package guard

import (
	"crypto/tls"
	"io"
	"net/netip"
	"strconv"
	"strings"
	"testing"
	"time"

	"kalium.dev/kalium/runtime/internal/frame"
	"kalium.dev/kalium/runtime/internal/guard/guardtest"
)

// quiet is a controller that grants what is asked and forgets what it is told.
type quiet struct{}

func (quiet) Start(_ time.Time, m *frame.Start) (*frame.Answer, error) {
	return guardtest.GrantStart(m)
}
func (quiet) Invoke(_ time.Time, m *frame.Invoke) (*frame.Answer, error) {
	return guardtest.GrantInvoke(m)
}
func (quiet) Finish(_ time.Time, m *frame.Finish) (*frame.Answer, error) {
	return guardtest.GrantFinish(m)
}
func (quiet) End(*frame.End)                            {}
func (quiet) Mode(*frame.Mode)                          {}
func (quiet) Log(time.Time, *frame.VerdictRecord) error { return nil }

// looping is a guard whose function may GET /a without end, in the middle of an invocation.
func looping(t testing.TB) *Guard {
	t.Helper()
	g, err := New(testIdentity, guardtest.PublicKey, guardtest.WelcomeEdited(t, "enforce", `"edges":[[0,0,1],`, `"edges":[[0,0,0],`), quiet{})
	if err != nil {
		t.Fatal(err)
	}
	in, _ := g.Accept(8080, client)
	if a := in.Admit([]byte(postRequest), nil); a.Release == nil {
		t.Fatalf("the request was not released: %+v", a)
	}
	return g
}

// getOf is a request for /a whose head has n bytes.
func getOf(n int) string {
	head := "GET /a HTTP/1.1\r\nHost: api.test:8080\r\nUser-Agent: bench/1\r\nAccept: */*\r\nAccept-Encoding: gzip, deflate\r\nX: "
	return head + strings.Repeat("x", n-len(head)-4) + "\r\n\r\n"
}

// sealed are n requests in TLS records, of a connection whose handshake is over.
func sealed(t testing.TB, n int, request string) (*Outgoing, [][]byte) {
	t.Helper()
	g := looping(t)
	s := dialTLS(t, g, images, logged(g, &tls.Config{ServerName: "images.test"}), &tls.Config{})
	if _, err := io.WriteString(s, request); err != nil {
		t.Fatal(err)
	}
	var kept [][]byte
	s.kept = &kept
	for range n {
		if _, err := io.WriteString(s, request); err != nil {
			t.Fatal(err)
		}
	}
	return s.out, kept
}

func TestAJudgedRequestUnderTLSCostsNoMemory(t *testing.T) {
	const runs = 1000
	out, kept := sealed(t, runs+101, getI)
	next := func() {
		if _, outcome := out.Write(kept[0]); outcome != Allowed {
			t.Fatal("denied")
		}
		kept = kept[1:]
		out.Sent()
		out.Answered(100)
	}
	for range 100 {
		next()
	}

	if allocations := testing.AllocsPerRun(runs, next); allocations != 0 {
		t.Errorf("%v allocations for each request", allocations)
	}
}

func TestAJudgedRequestCostsNoMemory(t *testing.T) {
	g := looping(t)
	out := connect(t, g, api)
	m := []byte(getOf(1024))
	for range 100 {
		out.Write(m)
	}

	allocations := testing.AllocsPerRun(1000, func() {
		if _, outcome := out.Write(m); outcome != Allowed {
			t.Fatal("denied")
		}
		out.Sent()
		out.Answered(1)
	})

	if allocations != 0 {
		t.Errorf("%v allocations for each request", allocations)
	}
}

func BenchmarkRequest(b *testing.B) {
	for _, n := range []int{128, 1024, 8192} {
		b.Run(strconv.Itoa(n), func(b *testing.B) {
			g := looping(b)
			out, _ := g.Connect(netip.MustParseAddrPort(api))
			m := []byte(getOf(n))
			b.SetBytes(int64(n))
			b.ReportAllocs()
			for b.Loop() {
				if _, outcome := out.Write(m); outcome != Allowed {
					b.Fatal("denied")
				}
				out.Sent()
				out.Answered(1)
			}
		})
	}
}
