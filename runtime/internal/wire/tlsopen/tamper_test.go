package tlsopen

import (
	"bytes"
	"crypto/tls"
	"errors"
	"slices"
	"strings"
	"testing"

	"kalium.dev/kalium/runtime/internal/wire"
)

// session is what went over a connection, in order.
type session struct {
	keys  string
	steps []step
	plain string
}

type step struct {
	server bool
	bytes  []byte
}

// replay runs a session through a client and returns what came out as data, and whether the client was refused.
func (s *session) replay(steps []step) (plain []byte, err error) {
	keys := NewKeys()
	_, _ = keys.Writer().Write([]byte(s.keys))
	client := NewClient(keys)
	defer client.Close()
	var held []byte
	for _, step := range steps {
		if step.server {
			client.Inbound(step.bytes)
			continue
		}
		held = append(held, step.bytes...)
		for {
			n, u, err := client.Next(held)
			if err == wire.ErrShort {
				break
			}
			if err != nil {
				return plain, err
			}
			plain = append(plain, u.Data...)
			held = held[n:]
		}
	}
	return plain, nil
}

// recorder notes what a client and its server say to each other.
type recorder struct {
	*guarded
	session *session
}

func (r *recorder) Write(b []byte) (int, error) {
	r.session.steps = append(r.session.steps, step{false, bytes.Clone(b)})
	return r.guarded.Write(b)
}

func (r *recorder) Read(b []byte) (int, error) {
	n, err := r.guarded.Read(b)
	r.session.steps = append(r.session.steps, step{true, bytes.Clone(b[:n])})
	return n, err
}

func recorded(t testing.TB, version, suite uint16) *session {
	t.Helper()
	server := startEcho(t, &tls.Config{MaxVersion: version, CipherSuites: []uint16{suite}})
	keys := NewKeys()
	log := keys.Writer()
	s := &session{}
	r := &recorder{dial(t, server.address, keys, nil), s}
	var lines strings.Builder
	conn := tls.Client(r, clientConfig(writerFunc(func(line string) {
		lines.WriteString(line)
		_, _ = log.Write([]byte(line))
	})))
	exchange(t, conn, []byte("GET / HTTP/1.1\r\n"), []byte("Host: peer.test\r\n\r\n"))
	if err := conn.Close(); err != nil {
		t.Fatal(err)
	}
	s.keys, s.plain = lines.String(), r.plain.String()
	return s
}

// A flipped bit leads to a refusal, or to the same data or less of it, where a record became longer than what follows.
func TestFlippedBits(t *testing.T) {
	for name, s := range map[string]*session{
		"TLS 1.3":              recorded(t, tls.VersionTLS13, 0),
		"TLS 1.2, AES-GCM":     recorded(t, tls.VersionTLS12, aes128TLS12),
		"TLS 1.2, ChaCha20":    recorded(t, tls.VersionTLS12, chachaTLS12),
		"TLS 1.2, 256-bit AES": recorded(t, tls.VersionTLS12, aes256TLS12),
	} {
		t.Run(name, func(t *testing.T) {
			plain, err := s.replay(s.steps)
			if err != nil || string(plain) != s.plain || s.plain == "" {
				t.Fatalf("unchanged: %q, %v", plain, err)
			}
			refused, harmless := 0, 0
			for i := range s.steps {
				original := s.steps[i].bytes
				if s.steps[i].server && i > 2 {
					continue // nothing of it counts behind the ServerHello
				}
				isData := original[0] == contentApplicationData && i < len(s.steps)-1 // the last is the close_notify
				for bit := range 8 * min(len(original), 600) {
					changed := slices.Clone(s.steps)
					changed[i].bytes = bytes.Clone(original)
					changed[i].bytes[bit/8] ^= 1 << (bit % 8)
					plain, err := s.replay(changed)
					var reason *wire.Error
					switch {
					case !strings.HasPrefix(s.plain, string(plain)) || isData && len(plain) == len(s.plain):
						t.Fatalf("step %d, bit %d: %q", i, bit, plain)
					case err == nil:
						harmless++
					case errors.As(err, &reason):
						refused++
					default:
						t.Fatalf("step %d, bit %d: an error of another kind: %v", i, bit, err)
					}
				}
			}
			t.Logf("%d refused, %d without effect", refused, harmless)
		})
	}
}
