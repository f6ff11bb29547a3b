package tlsopen

import (
	"bytes"
	"errors"
	"testing"

	"kalium.dev/kalium/runtime/internal/wire"
)

// pack writes a session for the fuzzer: of each step its side, two bytes of length, and its bytes.
func pack(steps []step) (all []byte) {
	for _, s := range steps {
		side := byte('C')
		if s.server {
			side = 'S'
		}
		all = append(append(all, side), vector(2, s.bytes)...)
	}
	return all
}

func unpack(all []byte) (steps []step) {
	for len(all) >= 3 {
		n := min(int(all[1])<<8|int(all[2]), len(all)-3)
		steps = append(steps, step{all[0] == 'S', bytes.Clone(all[3 : 3+n])})
		all = all[3+n:]
	}
	return steps
}

// scripted is a whole session of one suite, with what is rare in it.
func scripted(t testing.TB, number uint16) (steps []step, keys string) {
	t.Helper()
	tls13Suite := suites[number].tls13
	send := func(b []byte) { steps = append(steps, step{false, b}) }
	version := tls12
	if tls13Suite {
		version = tls13
	}
	send(firstHello())
	if tls13Suite {
		steps = append(steps, step{true, record(contentHandshake, hrr())})
		send(append(bytes.Clone(changeCipherSpec), firstHello()...))
	}
	steps = append(steps, step{true, record(contentHandshake, serverHello(serverRandom, number, version))})
	var s *script
	if tls13Suite {
		s = finishingWith(t, number)
		send(s.seal(contentHandshake, message(messageCertificate, []byte{0, 0, 0, 0})))
		send(s.seal(contentHandshake, finishedOf(suites[number].digest)))
		s.traffic(number, "CLIENT_TRAFFIC_SECRET_0")
	} else {
		s = changedWith(t, number)
		send(record(contentHandshake, message(messageClientKeyExchange, make([]byte, 33))))
		send(changeCipherSpec)
		send(s.seal(contentHandshake, finishedOf(finishedBytes)))
	}
	send(s.seal(contentApplicationData, []byte("GET / HTTP/1.1\r\n\r\n")))
	if tls13Suite {
		send(s.seal(contentHandshake, message(messageKeyUpdate, []byte{1})))
		next, err := s.sending.update()
		if err != nil {
			t.Fatal(err)
		}
		s.sending = next
	}
	send(append(s.seal(contentApplicationData, []byte("more")), s.seal(contentAlert, []byte{1, 0})...))
	for label, n := range map[string]int{
		"CLIENT_RANDOM": secretMax, "CLIENT_HANDSHAKE_TRAFFIC_SECRET": suites[number].digest, "CLIENT_TRAFFIC_SECRET_0": suites[number].digest,
	} {
		keys += lineFor(label, n)
	}
	return steps, keys
}

func TestScriptedSessionsAreWhole(t *testing.T) {
	for _, number := range allSuites {
		steps, keys := scripted(t, number)
		s := session{keys: keys}
		if plain, err := s.replay(unpack(pack(steps))); err != nil || string(plain) != "GET / HTTP/1.1\r\n\r\nmore" {
			t.Errorf("%#04x: %q, %v", number, plain, err)
		}
	}
}

// FuzzClient: whatever both sides and the key log say, only the declared errors come out, a short record is left as it
// is, data lies in the bytes that were given, and what is sealed for it opens to the same.
func FuzzClient(f *testing.F) {
	for _, number := range allSuites {
		steps, keys := scripted(f, number)
		f.Add(pack(steps), []byte(keys))
	}
	f.Fuzz(func(t *testing.T, packed, lines []byte) {
		keys := NewKeys()
		_, _ = keys.Writer().Write(lines)
		client := NewClient(keys)
		var held, dst []byte
		for _, s := range unpack(packed) {
			if s.server {
				client.Inbound(s.bytes)
				continue
			}
			held = append(held, s.bytes...)
			for {
				before := bytes.Clone(held)
				n, u, err := client.Next(held)
				if err != nil {
					var refused *wire.Error
					if err != wire.ErrShort && !errors.As(err, &refused) {
						t.Fatalf("error of another kind: %v", err)
					}
					if _, _, again := client.Next(before); again != err {
						t.Fatalf("%v, and then %v", err, again)
					}
					if (err == wire.ErrShort || !client.Opened()) && !bytes.Equal(before, held) {
						t.Fatalf("bytes were changed behind %v", err)
					}
					break
				}
				if n <= 0 || n > len(held) || u.Kind == 0 || u.Kind > KindControl || (u.Kind == KindHello) != (u.Hello != nil) {
					t.Fatalf("%d bytes of %d, %+v", n, len(held), u)
				}
				if u.Kind != KindData && u.Kind != KindControl && !bytes.Equal(before, held) {
					t.Fatal("bytes that leave as they are were changed")
				}
				if u.Kind == KindControl {
					dst = client.SealControl(dst[:0])
				}
				if u.Kind == KindData {
					server := reader{t, client.sealing}
					dst = client.Seal(dst[:0], u.Data)
					var got string
					for _, r := range server.all(dst) {
						got += r.content
					}
					if got != string(u.Data) {
						t.Fatalf("%q was sealed for %q", got, u.Data)
					}
				}
				held = held[n:]
			}
		}
		client.Close()
		if len(keys.entries) > randomsMax {
			t.Fatal("too many keys")
		}
	})
}

// FuzzSealed: a client that has the right keys seals what it likes. What it seals as data comes out and leaves as the
// same data, nothing else does, and what is wrong is refused. Each record is written as its type, a length and content.
func FuzzSealed(f *testing.F) {
	for i, number := range allSuites {
		finished := finishedOf(finishedBytes)
		if suites[number].tls13 {
			finished = finishedOf(suites[number].digest)
		}
		ops := append([]byte{contentHandshake, byte(len(finished))}, finished...)
		ops = append(ops, contentApplicationData, 3, 'G', 'E', 'T', contentAlert, 2, 1, 100, contentHandshake, 5, messageKeyUpdate, 0, 0, 1, 0)
		f.Add(byte(i), append(ops, contentApplicationData, 1, 'x', contentAlert, 2, 1, 0))
	}
	f.Add(byte(0), []byte{contentHandshake, 6, messageCertificate, 0, 0, 4, 0, 0, contentHandshake, 2, 0, 0, contentApplicationData, 1, 'x'})
	f.Fuzz(func(t *testing.T, which byte, ops []byte) {
		number := allSuites[int(which)%len(allSuites)]
		suite := suites[number]
		var s *script
		if suite.tls13 {
			s = finishingWith(t, number)
			s.logSecret("CLIENT_TRAFFIC_SECRET_0", suite.digest)
		} else {
			s = changedWith(t, number)
		}
		var server *reader
		for len(ops) >= 2 {
			n := min(int(ops[1]), len(ops)-2)
			kind, content := ops[0], ops[2:2+n]
			ops = ops[2+n:]
			s.sealed = s.sealed[:0]
			u, err := s.try(s.seal(kind, content))
			if err == wire.ErrShort {
				t.Fatal("a whole record is short")
			}
			if err != nil {
				return
			}
			if (u.Kind == KindData) != (kind == contentApplicationData) || !bytes.Equal(u.Data, content) && u.Kind == KindData {
				t.Fatalf("%q of type %d became %+v", content, kind, u)
			}
			if u.Kind == KindPass {
				if len(s.sealed) > 0 {
					t.Fatal("something was sealed inside the handshake")
				}
				if s.client.stage != protected {
					continue
				}
				if suite.tls13 {
					s.traffic(number, "CLIENT_TRAFFIC_SECRET_0")
				}
				server = readerOf(s)
				continue
			}
			var got []byte
			for _, r := range server.all(s.sealed) {
				if r.kind != kind {
					t.Fatalf("type %d left for type %d", r.kind, kind)
				}
				got = append(got, r.content...)
			}
			if !bytes.Equal(got, content) {
				t.Fatalf("%q left for %q", got, content)
			}
			if kind == contentHandshake {
				if s.sending, err = s.sending.update(); err != nil {
					t.Fatal(err)
				}
				server = readerOf(s)
			}
		}
	})
}
