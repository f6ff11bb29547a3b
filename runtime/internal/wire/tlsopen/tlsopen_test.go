package tlsopen

import (
	"bytes"
	"fmt"
	"strings"
	"testing"

	"kalium.dev/kalium/runtime/internal/policy"
	"kalium.dev/kalium/runtime/internal/wire"
)

func hrr(extensions ...[]byte) []byte {
	return serverHello(retryRandom, aes128TLS13, tls13, extensions...)
}

func TestRefusals(t *testing.T) {
	finishing := func(t testing.TB) *script { return finishingWith(t, aes128TLS13) }
	changed := func(t testing.TB) *script { return changedWith(t, aes128TLS12) }
	protected13 := func(t testing.TB) *script { return protectedBy(t, aes128TLS13) }
	protected12 := func(t testing.TB) *script { return protectedBy(t, aes128TLS12) }
	greeted13 := func(t testing.TB) *script { return greetedBy(t, serverHello(serverRandom, aes128TLS13, tls13)) }
	greeted12 := func(t testing.TB) *script { return greetedBy(t, serverHello(serverRandom, aes128TLS12, tls12)) }
	retried := func(t testing.TB) *script { return greetedBy(t, hrr()) }
	serverSays := func(hello []byte) func(testing.TB) *script {
		return func(t testing.TB) *script { return greetedBy(t, hello) }
	}
	sealed := func(kind byte, content []byte) func(*script) []byte {
		return func(s *script) []byte { return s.seal(kind, content) }
	}
	plain := func(b []byte) func(*script) []byte { return func(*script) []byte { return b } }
	keyExchange := record(contentHandshake, message(messageClientKeyExchange, make([]byte, 33)))
	data := record(contentApplicationData, make([]byte, 100))

	for _, test := range []struct {
		name string
		at   func(testing.TB) *script
		send func(*script) []byte
		want policy.Reason
	}{
		// The first bytes.
		{"another protocol", asScript(newScript), plain([]byte("GET / HTTP/1.1\r\n")), policy.ReasonMalformed},
		{"application data first", asScript(newScript), plain(data), policy.ReasonMalformed},
		{"ChangeCipherSpec first", asScript(newScript), plain(changeCipherSpec), policy.ReasonMalformed},
		{"alert first", asScript(newScript), plain(record(contentAlert, []byte{2, 0})), policy.ReasonMalformed},
		{"the program is the server", asScript(newScript), plain(record(contentHandshake, serverHello(serverRandom, aes128TLS13, tls13))), policy.ReasonMalformed},
		{"early data", asScript(newScript), plain(clientHello(testRandom, serverName, "h2", extension(42, nil))), policy.ReasonUnsupported},
		{"encrypted hello", asScript(newScript), plain(clientHello(testRandom, serverName, "h2", extension(0xfe0d, make([]byte, 9)))), policy.ReasonUnsupported},

		// Before the server's answer.
		{"a second hello unasked", func(t testing.TB) *script { s := newScript(t); s.pass(firstHello(), KindHello); return s }, plain(firstHello()), policy.ReasonMalformed},
		{"data unanswered", func(t testing.TB) *script { s := newScript(t); s.pass(firstHello(), KindHello); return s }, plain(data), policy.ReasonMalformed},
		{"ChangeCipherSpec unanswered", func(t testing.TB) *script { s := newScript(t); s.pass(firstHello(), KindHello); return s }, plain(changeCipherSpec), policy.ReasonMalformed},
		{"key exchange unanswered", func(t testing.TB) *script { s := newScript(t); s.pass(firstHello(), KindHello); return s }, plain(keyExchange), policy.ReasonMalformed},

		// HelloRetryRequest.
		{"retry for another server", retried, plain(clientHello(testRandom, "other.test", "h2")), policy.ReasonSNIMismatch},
		{"retry with another random", retried, plain(clientHello([32]byte{9}, serverName, "h2")), policy.ReasonMalformed},
		{"retry with another ALPN", retried, plain(clientHello(testRandom, serverName, "http/1.1")), policy.ReasonMalformed},
		{"retry with early data", retried, plain(clientHello(testRandom, serverName, "h2", extension(42, nil))), policy.ReasonUnsupported},
		{"retry with an encrypted hello", retried, plain(clientHello(testRandom, serverName, "h2", extension(0xfe0d, make([]byte, 9)))), policy.ReasonUnsupported},
		{"a third hello", func(t testing.TB) *script { s := retried(t); s.pass(firstHello(), KindHello); return s }, plain(firstHello()), policy.ReasonMalformed},
		{"data instead of a retry", retried, plain(data), policy.ReasonMalformed},
		{"two ChangeCipherSpecs before a retry", func(t testing.TB) *script { s := retried(t); s.pass(changeCipherSpec, KindPass); return s }, plain(changeCipherSpec), policy.ReasonMalformed},
		{"a hello behind the ServerHello", greeted13, plain(firstHello()), policy.ReasonMalformed},

		// The server's answer.
		{"CBC", serverSays(serverHello(serverRandom, 0xc013, tls12)), plain(keyExchange), policy.ReasonUnsupported},
		{"CCM of TLS 1.2", serverSays(serverHello(serverRandom, 0xc09e, tls12)), plain(keyExchange), policy.ReasonUnsupported},
		{"CCM of TLS 1.3", serverSays(serverHello(serverRandom, 0x1304, tls13)), plain(data), policy.ReasonUnsupported},
		{"no encryption", serverSays(serverHello(serverRandom, 0x0002, tls12)), plain(keyExchange), policy.ReasonUnsupported},
		{"a suite of the other version", serverSays(serverHello(serverRandom, aes128TLS13, tls12)), plain(keyExchange), policy.ReasonUnsupported},
		{"and the other way", serverSays(serverHello(serverRandom, aes128TLS12, tls13)), plain(data), policy.ReasonUnsupported},
		{"TLS 1.1", serverSays(serverHello(serverRandom, aes128TLS12, []byte{3, 2})), plain(keyExchange), policy.ReasonUnsupported},
		{"TLS 1.4", serverSays(serverHello(serverRandom, aes128TLS13, tls12, extension(43, []byte{3, 5}))), plain(data), policy.ReasonUnsupported},
		{"two versions", serverSays(serverHello(serverRandom, aes128TLS13, tls13, extension(43, tls13))), plain(data), policy.ReasonMalformed},
		{"a cut ServerHello", serverSays(message(2, []byte{3, 3})), plain(data), policy.ReasonMalformed},
		{"another message", serverSays(message(11, make([]byte, 40))), plain(data), policy.ReasonMalformed},
		{"two retries", serverSays(append(hrr(), hrr()...)), plain(firstHello()), policy.ReasonMalformed},
		{"a huge ServerHello", serverSays([]byte{2, 1, 0, 0}), plain(data), policy.ReasonMalformed},

		// TLS 1.2.
		{"a client's certificate verified before its exchange", greeted12, plain(record(contentHandshake, message(messageCertificateVerify, make([]byte, 9)))), policy.ReasonMalformed},
		{"Finished in clear", greeted12, plain(record(contentHandshake, finishedOf(12))), policy.ReasonMalformed},
		{"a hello inside the handshake", greeted12, plain(firstHello()), policy.ReasonMalformed},
		{"two key exchanges", func(t testing.TB) *script { s := greeted12(t); s.pass(keyExchange, KindPass); return s }, plain(keyExchange), policy.ReasonMalformed},
		{"a key exchange of nothing", greeted12, plain(record(contentHandshake, message(messageClientKeyExchange, nil))), policy.ReasonMalformed},
		{"data in clear", greeted12, plain(data), policy.ReasonMalformed},
		{"a certificate without a key exchange", func(t testing.TB) *script {
			s := greeted12(t)
			s.pass(record(contentHandshake, message(messageCertificate, []byte{0, 0, 0})), KindPass)
			return s
		}, plain(changeCipherSpec), policy.ReasonMalformed},
		{"ChangeCipherSpec inside a message", func(t testing.TB) *script {
			s := greeted12(t)
			s.logSecret("CLIENT_RANDOM", secretMax)
			s.pass(record(contentHandshake, []byte{messageClientKeyExchange, 0, 0, 9, 1}), KindPass)
			return s
		}, plain(changeCipherSpec), policy.ReasonMalformed},
		{"ChangeCipherSpec of other content", greeted12, plain(record(contentChangeCipherSpec, []byte{2})), policy.ReasonMalformed},
		{"a long ChangeCipherSpec", greeted12, plain(record(contentChangeCipherSpec, []byte{1, 1})), policy.ReasonMalformed},
		{"no master secret", func(t testing.TB) *script {
			s := greeted12(t)
			s.pass(keyExchange, KindPass)
			s.pass(changeCipherSpec, KindPass) // OpenSSL may log the secret only now
			return s
		}, plain(record(contentHandshake, make([]byte, 40))), policy.ReasonNoKey},
		{"Finished does not open", changed, plain(record(contentHandshake, make([]byte, 40))), policy.ReasonNoKey},
		{"Finished with more", changed, sealed(contentHandshake, append(finishedOf(12), 0)), policy.ReasonMalformed},
		{"another message for a Finished", changed, sealed(contentHandshake, message(messageClientKeyExchange, make([]byte, 12))), policy.ReasonMalformed},
		{"a short Finished", changed, sealed(contentHandshake, finishedOf(11)), policy.ReasonMalformed},
		{"data for a Finished", changed, sealed(contentApplicationData, finishedOf(12)), policy.ReasonMalformed},
		{"two ChangeCipherSpecs", changed, plain(changeCipherSpec), policy.ReasonMalformed},
		{"renegotiation", protected12, sealed(contentHandshake, firstHello()[headerBytes:]), policy.ReasonUnsupported},
		{"ChangeCipherSpec behind the handshake", protected12, sealed(contentChangeCipherSpec, []byte{1}), policy.ReasonMalformed},
		{"a plain hello behind the handshake", protected12, plain(firstHello()), policy.ReasonNoKey},
		{"data in clear behind the handshake", protected12, plain(data), policy.ReasonNoKey},
		{"a plain alert behind the handshake", protected12, plain(record(contentAlert, []byte{1, 0})), policy.ReasonMalformed},
		{"an old version behind the handshake", protected12, func(s *script) []byte {
			b := s.seal(contentApplicationData, []byte("x"))
			b[2] = 1
			return b
		}, policy.ReasonMalformed},

		// TLS 1.3.
		{"no handshake secret", greeted13, plain(data), policy.ReasonNoKey},
		{"a handshake secret of another suite", func(t testing.TB) *script {
			s := greeted13(t)
			s.logSecret("CLIENT_HANDSHAKE_TRAFFIC_SECRET", 48)
			return s
		}, plain(data), policy.ReasonNoKey},
		{"Finished does not open under the handshake key", finishing, plain(data), policy.ReasonNoKey},
		{"data under the handshake key", finishing, sealed(contentApplicationData, []byte("GET / HTTP/1.1\r\n\r\n")), policy.ReasonMalformed},
		{"data that is as long as a Finished", finishing, sealed(contentApplicationData, finishedOf(32)), policy.ReasonMalformed},
		{"end of early data", finishing, sealed(contentHandshake, message(5, nil)), policy.ReasonMalformed},
		{"a hello under the handshake key", finishing, sealed(contentHandshake, firstHello()[headerBytes:]), policy.ReasonMalformed},
		{"a long Finished in TLS 1.3", finishing, sealed(contentHandshake, finishedOf(48)), policy.ReasonMalformed},
		{"more behind the Finished", finishing, sealed(contentHandshake, append(finishedOf(32), 1)), policy.ReasonMalformed},
		{"CertificateVerify without a certificate", finishing, sealed(contentHandshake, message(messageCertificateVerify, make([]byte, 9))), policy.ReasonMalformed},
		{"an empty handshake record", finishing, sealed(contentHandshake, nil), policy.ReasonMalformed},
		{"padding in the handshake", finishing, sealed(0, append(finishedOf(32), contentHandshake)), policy.ReasonUnsupported},
		{"nothing but padding", finishing, sealed(0, nil), policy.ReasonUnsupported},
		{"an unknown content type", finishing, sealed(99, finishedOf(32)), policy.ReasonMalformed},
		{"ChangeCipherSpec under the handshake key", finishing, sealed(contentChangeCipherSpec, []byte{1}), policy.ReasonMalformed},
		{"two ChangeCipherSpecs in TLS 1.3", finishing, plain(changeCipherSpec), policy.ReasonMalformed},
		{"a plain handshake message in TLS 1.3", finishing, plain(record(contentHandshake, finishedOf(32))), policy.ReasonMalformed},
		{"a handshake beyond its bound", func(t testing.TB) *script {
			s := finishing(t)
			s.pass(s.seal(contentHandshake, append([]byte{messageCertificate, 0xff, 0, 0}, make([]byte, 16000)...)), KindPass)
			s.pass(s.seal(contentHandshake, make([]byte, 16000)), KindPass)
			return s
		}, sealed(contentHandshake, make([]byte, 16000)), policy.ReasonTooLarge},
		{"no application secret", func(t testing.TB) *script {
			s := finishing(t)
			s.pass(s.seal(contentHandshake, finishedOf(32)), KindPass)
			return s
		}, sealed(contentApplicationData, []byte("x")), policy.ReasonNoKey},
		{"padding", protected13, sealed(0, []byte{'x', contentApplicationData}), policy.ReasonUnsupported},
		{"authentication behind the handshake", protected13, sealed(contentHandshake, message(messageCertificate, make([]byte, 9))), policy.ReasonUnsupported},
		{"Finished behind the handshake", protected13, sealed(contentHandshake, finishedOf(32)), policy.ReasonUnsupported},
		{"a KeyUpdate with a tail", protected13, sealed(contentHandshake, append(message(messageKeyUpdate, []byte{0}), 0)), policy.ReasonMalformed},
		{"a KeyUpdate of another request", protected13, sealed(contentHandshake, message(messageKeyUpdate, []byte{2})), policy.ReasonMalformed},
		{"half a KeyUpdate", protected13, sealed(contentHandshake, []byte{messageKeyUpdate, 0, 0}), policy.ReasonMalformed},
		{"nothing of a handshake message", protected13, sealed(contentHandshake, nil), policy.ReasonMalformed},
		{"ChangeCipherSpec behind the handshake of TLS 1.3", protected13, plain(changeCipherSpec), policy.ReasonMalformed},
		{"a plain alert behind the handshake of TLS 1.3", protected13, plain(record(contentAlert, []byte{1, 0})), policy.ReasonMalformed},
		{"an unknown content type behind the handshake", protected13, sealed(24, []byte("x")), policy.ReasonMalformed},

		// Alerts.
		{"a long alert", protected13, sealed(contentAlert, []byte{1, 0, 'x'}), policy.ReasonMalformed},
		{"an alert of another level", protected13, sealed(contentAlert, []byte{3, 0}), policy.ReasonMalformed},
		{"a long alert in clear", greeted13, plain(record(contentAlert, []byte{2, 40, 0})), policy.ReasonMalformed},
		{"too many alerts", func(t testing.TB) *script {
			s := protected12(t)
			for range alertsMax {
				s.pass(s.seal(contentAlert, []byte{1, 100}), KindControl)
			}
			return s
		}, sealed(contentAlert, []byte{1, 100}), policy.ReasonTooLarge},
		{"data behind close_notify", func(t testing.TB) *script {
			s := protected12(t)
			s.pass(s.seal(contentAlert, []byte{1, 0}), KindControl)
			return s
		}, sealed(contentApplicationData, []byte("x")), policy.ReasonMalformed},
		{"data behind an alert of TLS 1.3, whatever its level", func(t testing.TB) *script {
			s := protected13(t)
			s.pass(s.seal(contentAlert, []byte{1, 42}), KindControl)
			return s
		}, sealed(contentApplicationData, []byte("x")), policy.ReasonMalformed},
		{"Finished behind an alert", func(t testing.TB) *script {
			s := finishing(t)
			s.pass(s.seal(contentAlert, []byte{2, 42}), KindPass)
			return s
		}, sealed(contentHandshake, finishedOf(32)), policy.ReasonMalformed},
		{"a key exchange behind an alert", func(t testing.TB) *script {
			s := greeted12(t)
			s.pass(record(contentAlert, []byte{2, 42}), KindPass)
			return s
		}, plain(keyExchange), policy.ReasonMalformed},

		// Records.
		{"type 24", protected13, plain(record(24, []byte("x"))), policy.ReasonMalformed},
		{"version 2", protected13, plain([]byte{23, 2}), policy.ReasonMalformed},
		{"version 3.4", protected13, plain([]byte{23, 3, 4}), policy.ReasonMalformed},
		{"an empty record", protected12, plain(record(contentApplicationData, nil)), policy.ReasonMalformed},
		{"a record of nothing but a tag", protected13, plain(record(contentApplicationData, make([]byte, 16))), policy.ReasonMalformed},
		{"a record beyond the bound of its suite", protected13, plain(record(contentApplicationData, make([]byte, fragmentBytes+18))), policy.ReasonMalformed},
		{"a record beyond all bounds", protected13, plain([]byte{23, 3, 3, 0x48, 1}), policy.ReasonMalformed},
		{"a clear record beyond the bound", greeted12, plain(record(contentHandshake, make([]byte, fragmentBytes+1))), policy.ReasonMalformed},
	} {
		t.Run(test.name, func(t *testing.T) {
			s := test.at(t)
			s.refuse(test.send(s), test.want)
			if len(s.keys.entries) > 1 || s.client.holds {
				t.Error("keys stay held")
			}
		})
	}
}

func asScript(f func(testing.TB) *script) func(testing.TB) *script { return f }

func TestARecordIsWholeOrShort(t *testing.T) {
	for _, number := range allSuites {
		s := protectedBy(t, number)
		b := s.seal(contentApplicationData, []byte("hello"))
		for n := range b {
			if _, err := s.try(b[:n]); err != wire.ErrShort {
				t.Fatalf("%#04x, %d bytes: %v", number, n, err)
			}
		}
		if u := s.pass(b, KindData); string(u.Data) != "hello" {
			t.Fatalf("%q", u.Data)
		}
	}
}

// What leaves: the first byte alone, everything in order, no record larger than the client's own.
func TestReseal(t *testing.T) {
	for _, number := range allSuites {
		t.Run(fmt.Sprintf("%#04x", number), func(t *testing.T) {
			s := protectedBy(t, number)
			server := readerOf(s)
			first := s.sending.explicit
			s.pass(s.seal(contentApplicationData, []byte("first")), KindData)
			s.pass(s.seal(contentApplicationData, nil), KindData)
			s.sending.explicit += 1000 // ours do not follow the program's
			s.pass(s.seal(contentApplicationData, bytes.Repeat([]byte("x"), 600)), KindData)
			s.sealed = s.client.Seal(s.sealed, bytes.Repeat([]byte("y"), 601))
			s.pass(s.seal(contentAlert, []byte{1, 0}), KindControl)
			want := []sealedRecord{
				{kind: 23, content: "f"}, {kind: 23, content: "irst"}, {kind: 23, content: strings.Repeat("x", 600)},
				{kind: 23, content: strings.Repeat("y", 600)}, {kind: 23, content: "y"}, {kind: 21, content: "\x01\x00"},
			}
			if suites[number].explicit > 0 {
				for i := range want {
					want[i].nonce = first + uint64(i)
				}
			}
			if got := server.all(s.sealed); fmt.Sprint(got) != fmt.Sprint(want) {
				t.Errorf("got  %v\nwant %v", got, want)
			}
		})
	}
}

func TestKeyUpdate(t *testing.T) {
	s := protectedBy(t, aes256TLS13)
	server := readerOf(s)
	update := message(messageKeyUpdate, []byte{0})
	for i := range 3 {
		s.pass(s.seal(contentApplicationData, []byte("data")), KindData)
		s.pass(s.seal(contentHandshake, update), KindControl)
		next, err := s.sending.update()
		if err != nil {
			t.Fatal(err)
		}
		s.sending = next
		want := "[{23 data 0} {22 " + string(update) + " 0}]"
		if i == 0 {
			want = "[{23 d 0} {23 ata 0} {22 " + string(update) + " 0}]"
		}
		if got := fmt.Sprint(server.all(s.sealed)); got != want {
			t.Fatalf("%q where %q was expected", got, want)
		}
		s.sealed, server.protection = nil, next
	}
	s.client.updates = updatesMax
	s.refuse(s.seal(contentHandshake, update), policy.ReasonTooLarge)
}

func TestNothingIsSealedBeforeData(t *testing.T) {
	for _, s := range []*script{newScript(t), finishingWith(t, aes128TLS13), changedWith(t, aes128TLS12)} {
		if got := s.client.SealControl(s.client.Seal([]byte("x"), []byte("data"))); string(got) != "x" {
			t.Errorf("%q left", got)
		}
	}
}

func TestAClosedClientRefuses(t *testing.T) {
	s := greetedBy(t, serverHello(serverRandom, aes128TLS13, tls13))
	s.client.Close()
	s.client.Close()
	s.refuse(changeCipherSpec, policy.ReasonMalformed)
	if len(s.keys.entries) != 0 {
		t.Error("keys stay behind")
	}
}

// The alerts by which a handshake fails must reach the server.
func TestAlertsInsideTheHandshakePass(t *testing.T) {
	fatal := []byte{2, 48}
	s := newScript(t)
	s.pass(firstHello(), KindHello)
	s.pass(record(contentAlert, fatal), KindPass)
	s = greetedBy(t, serverHello(serverRandom, aes128TLS13, tls13))
	s.pass(record(contentAlert, fatal), KindPass)
	s = greetedBy(t, hrr())
	s.pass(record(contentAlert, fatal), KindPass)
	s = finishingWith(t, aes128TLS13)
	s.pass(s.seal(contentAlert, fatal), KindPass)
	s = protectedBy(t, aes128TLS13)
	s.pass(s.seal(contentAlert, []byte{1, alertUserCanceled}), KindControl)
	s.pass(s.seal(contentAlert, []byte{1, alertCloseNotify}), KindControl)
}

func TestMessagesMayBeCutOverRecords(t *testing.T) {
	s := finishingWith(t, aes256TLS13)
	flight := bytes.Join([][]byte{message(messageCertificate, make([]byte, 500)), message(messageCertificateVerify, make([]byte, 70)), finishedOf(48)}, nil)
	for i := range flight {
		s.pass(s.seal(contentHandshake, flight[i:i+1]), KindPass)
	}
	s.logSecret("CLIENT_TRAFFIC_SECRET_0", 48)
	s.traffic(aes256TLS13, "CLIENT_TRAFFIC_SECRET_0")
	s.pass(s.seal(contentApplicationData, []byte("x")), KindData)
}

// A wrong key must not spoil what may leave as it is where nothing is enforced.
func TestARefusedFirstRecordIsUnchanged(t *testing.T) {
	for _, number := range allSuites {
		s := protectedBy(t, number)
		b := s.seal(contentApplicationData, []byte("data"))
		b[len(b)-1] ^= 1
		mine := bytes.Clone(b)
		if _, _, err := s.client.Next(mine); err == nil || s.client.Opened() || !bytes.Equal(mine, b) {
			t.Errorf("%#04x: %v", number, err)
		}
	}
}

func TestInboundInAnyCuts(t *testing.T) {
	answer := bytes.Join([][]byte{
		record(contentAlert, []byte{1, 112}), record(contentHandshake, message(messageHelloRequest, nil)), record(contentHandshake, hrr(extension(44, make([]byte, 300)))), changeCipherSpec,
	}, nil)
	hello := serverHello(serverRandom, aes128TLS13, tls13)
	rest := bytes.Join([][]byte{
		record(contentHandshake, hello[:3]), record(contentHandshake, hello[3:20]), record(contentHandshake, append(hello[20:len(hello):len(hello)], "more"...)),
		[]byte("whatever follows"),
	}, nil)
	for _, piece := range []int{1, 2, 3, 7, 100, 10000} {
		s := newScript(t)
		s.pass(firstHello(), KindHello)
		feed := func(b []byte) {
			for len(b) > 0 {
				n := min(piece, len(b))
				s.client.Inbound(b[:n])
				b = b[n:]
			}
		}
		feed(answer)
		if s.client.InboundDone() {
			t.Fatal("done before the ServerHello")
		}
		s.pass(changeCipherSpec, KindPass)
		s.pass(firstHello(), KindHello)
		feed(rest)
		if !s.client.InboundDone() || s.client.server.message != nil {
			t.Fatal("the server's bytes are still kept")
		}
		s.pass(changeCipherSpec, KindPass)
		s.logSecret("CLIENT_HANDSHAKE_TRAFFIC_SECRET", 32)
		s.traffic(aes128TLS13, "CLIENT_HANDSHAKE_TRAFFIC_SECRET")
		s.pass(s.seal(contentHandshake, finishedOf(32)), KindPass)
	}
}

func TestInboundIsBounded(t *testing.T) {
	endless := record(contentHandshake, append([]byte{2, 0, 0x40, 0}, make([]byte, 16000)...))
	client := NewClient(NewKeys())
	for range 1000 {
		client.Inbound(endless)
		if held := cap(client.server.message); held > 2*serverHelloMax {
			t.Fatalf("%d bytes are held", held)
		}
	}
	client = NewClient(NewKeys())
	for range 1000 {
		client.Inbound(record(contentAlert, make([]byte, 16000)))
	}
	if held := cap(client.server.message); held != 0 || client.InboundDone() {
		t.Fatalf("%d bytes are held", held)
	}
}

func TestNothingPrintsSecrets(t *testing.T) {
	s := protectedBy(t, aes128TLS13)
	s.pass(s.seal(contentApplicationData, []byte("data")), KindData)
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%x", "%d"} {
		for _, got := range []string{fmt.Sprintf(verb, s.client), fmt.Sprintf(verb, s.keys), fmt.Sprintf(verb, s.log)} {
			if !strings.HasPrefix(got, "tlsopen.") || len(got) > 20 {
				t.Errorf("%s prints %q", verb, got)
			}
		}
	}
}
