package http2

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"kalium.dev/kalium/runtime/internal/wire"
)

// reader is Go's own server, the second reader of the same bytes, and what clients sent to it.
type reader struct {
	server   *http.Server
	listener net.Listener

	mu   sync.Mutex
	sent []*bytes.Buffer // by connection
	read []string        // requests
}

// newReader listens on loopback for HTTP/2 without TLS.
func newReader(t testing.TB) *reader {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	r := &reader{listener: listener}
	r.server = &http.Server{Handler: r, Protocols: unencrypted()}
	go r.server.Serve(r)
	t.Cleanup(func() { r.server.Close() })
	return r
}

func unencrypted() *http.Protocols {
	protocols := &http.Protocols{}
	protocols.SetUnencryptedHTTP2(true)
	return protocols
}

// Accept, Close and Addr make a listener that records what arrives.
func (r *reader) Accept() (net.Conn, error) {
	conn, err := r.listener.Accept()
	if err != nil {
		return nil, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	sent := &bytes.Buffer{}
	r.sent = append(r.sent, sent)
	return &recorded{Conn: conn, reader: r, sent: sent}, nil
}

func (r *reader) Close() error   { return r.listener.Close() }
func (r *reader) Addr() net.Addr { return r.listener.Addr() }
func (r *reader) url() string    { return "http://" + r.Addr().String() }

type recorded struct {
	net.Conn
	reader *reader
	sent   *bytes.Buffer
}

func (c *recorded) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	c.reader.mu.Lock()
	defer c.reader.mu.Unlock()
	c.sent.Write(b[:n])
	return n, err
}

// ServeHTTP notes a request once its body is whole.
func (r *reader) ServeHTTP(w http.ResponseWriter, request *http.Request) {
	n, err := io.Copy(io.Discard, request.Body)
	if err == nil {
		r.mu.Lock()
		r.read = append(r.read, summary(request.Method, request.Host, request.URL.Path, keysOf(request.URL.RawQuery), n))
		r.mu.Unlock()
	}
	w.Write(bytes.Repeat([]byte("answer "), 5000))
}

func summary(method, host, path string, keys []string, body int64) string {
	return fmt.Sprintf("%s %s %s %q %d", method, strings.ToLower(host), path, keys, body)
}

func keysOf(query string) []string {
	keys := []string{}
	for _, pair := range strings.FieldsFunc(query, func(c rune) bool { return c == '&' }) {
		key, _, _ := strings.Cut(pair, "=")
		keys = append(keys, key)
	}
	return keys
}

// requests reads a connection in pieces and sums up the requests that are whole.
func requests(b []byte, cut func(left int) int) ([]string, error) {
	client := NewClient()
	heads, bodies := map[uint32]Head{}, map[uint32]int64{}
	var whole []string
	for at, end := 0, 0; end < len(b); {
		end = min(len(b), end+cut(len(b)-end))
		for at < end {
			n, u, err := client.Next(b[at:end:end])
			if err == wire.ErrShort {
				break // at the end: the client's last frame was on its way when the connection ended
			}
			if err != nil {
				return whole, err
			}
			at += n
			switch u.Kind {
			case Request:
				head := *u.Head
				head.Query = slices.Clone(head.Query)
				heads[u.Stream] = head
			case Data:
				bodies[u.Stream] += int64(u.Bytes)
			}
			if u.End {
				head := heads[u.Stream]
				whole = append(whole, summary(head.Method, head.Authority, head.Path, head.Query, bodies[u.Stream]))
			}
		}
	}
	return whole, nil
}

// check compares what the server read with what is read here, whole and in random pieces.
func (r *reader) check(t *testing.T, least int) {
	t.Helper()
	r.server.Close()
	r.mu.Lock()
	defer r.mu.Unlock()
	slices.Sort(r.read)
	if len(r.read) < least {
		t.Fatalf("only %d requests arrived, want %d: %q", len(r.read), least, r.read)
	}
	for round := range 30 {
		random := rand.New(rand.NewPCG(uint64(round), 1))
		var got []string
		for _, sent := range r.sent {
			longest := 1 << random.IntN(16)
			cut := func(int) int { return 1 + random.IntN(longest) }
			if round == 0 {
				cut = whole
			}
			found, err := requests(sent.Bytes(), cut)
			if err != nil {
				t.Fatalf("round %d: %v behind %q", round, err, found)
			}
			got = append(got, found...)
		}
		slices.Sort(got)
		if !slices.Equal(got, r.read) {
			t.Fatalf("round %d: read here\n%s\nby the server\n%s", round, strings.Join(got, "\n"), strings.Join(r.read, "\n"))
		}
	}
}

func TestGosClientIsReadAsItsServerReadsIt(t *testing.T) {
	r := newReader(t)
	client := &http.Client{Transport: &http.Transport{Protocols: unencrypted()}, Timeout: 20 * time.Second}
	send := func(method, target string, body io.Reader, fields ...string) {
		request, err := http.NewRequestWithContext(context.Background(), method, r.url()+target, body)
		if err != nil {
			t.Error(err)
			return
		}
		for i := 0; i < len(fields); i += 2 {
			request.Header.Set(fields[i], fields[i+1])
		}
		response, err := client.Do(request)
		if err != nil {
			t.Error(err)
			return
		}
		io.Copy(io.Discard, response.Body)
		response.Body.Close()
	}
	send("GET", "/first", nil)
	var wait sync.WaitGroup
	for i := range 40 {
		wait.Go(func() {
			send("GET", fmt.Sprintf("/a/%d?b=%d&c", i, i), nil, "X-Long", strings.Repeat("y", 100*i))
			send("POST", fmt.Sprintf("/b/%d", i), strings.NewReader(strings.Repeat("z", 1000*i)), "Content-Type", "text/plain")
			send("PUT", fmt.Sprintf("/c/%d", i), io.MultiReader(strings.NewReader("length "), strings.NewReader("unknown")))
			send("DELETE", fmt.Sprintf("/d/%d", i), nil)
		})
	}
	wait.Wait()
	send("PUT", "/large", bytes.NewReader(make([]byte, 1<<20)))
	r.check(t, 162)
}

func TestOtherClientsAreReadAsAServerReadsThem(t *testing.T) {
	const script = `
const client = require('http2').connect(process.argv[1]);
let open = 0;
function send(head, body) {
  open++;
  const stream = client.request(head, {endStream: body === undefined});
  stream.on('response', () => {}).on('data', () => {}).on('close', () => { if (--open === 0) client.close(); });
  if (body !== undefined) stream.end(body);
}
for (let i = 0; i < 20; i++) {
  send({':path': '/get?i=' + i, 'x-number': String(i)});
  send({':path': '/post/' + i, ':method': 'POST', 'content-type': 'application/json'}, 'x'.repeat(i * 3000));
}
client.ping(() => {});
send({':path': '/length', ':method': 'PUT', 'content-length': 5}, 'hello');`
	for name, c := range map[string]struct {
		program string
		runs    func(url string) [][]string
		least   int
	}{
		// One request a connection: Debian's 7.88.1 cannot use one again that it opened with prior knowledge.
		"curl": {"curl", func(url string) [][]string {
			return [][]string{
				{"--http2-prior-knowledge", "-sS", "-o", "/dev/null", url + "/a?b=c", "-H", "X-Y: z"},
				{"--http2-prior-knowledge", "-sS", "-o", "/dev/null", url + "/post", "-d", strings.Repeat("a", 70_000)},
				{"--http2-prior-knowledge", "-sS", "-I", url + "/head"},
			}
		}, 3},
		"Node": {"node", func(url string) [][]string { return [][]string{{"-e", script, url}} }, 41},
	} {
		t.Run(name, func(t *testing.T) {
			program, err := exec.LookPath(c.program)
			if err != nil {
				t.Skip(err)
			}
			r := newReader(t)
			ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
			defer cancel()
			for _, args := range c.runs(r.url()) {
				if out, err := exec.CommandContext(ctx, program, args...).CombinedOutput(); err != nil {
					t.Fatalf("%v: %s", err, out)
				}
			}
			r.check(t, c.least)
		})
	}
}
