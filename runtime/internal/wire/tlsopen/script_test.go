package tlsopen

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"testing"

	"kalium.dev/kalium/runtime/internal/policy"
	"kalium.dev/kalium/runtime/internal/wire"
)

// script plays a client that may do anything, and a server that is only its ServerHello.
type script struct {
	t      testing.TB
	keys   *Keys
	log    *KeyWriter
	client *Client

	sending protection // of the client
	sealed  []byte     // what left for Data and Control
}

var testRandom = [randomBytes]byte{1, 2, 3}
var serverRandom = [randomBytes]byte{4, 5, 6}

const (
	aes128TLS13 = 0x1301
	aes256TLS13 = 0x1302
	chachaTLS13 = 0x1303
	aes128TLS12 = 0xc02f
	aes256TLS12 = 0xc030
	chachaTLS12 = 0xcca8
)

var allSuites = []uint16{aes128TLS13, aes256TLS13, chachaTLS13, aes128TLS12, aes256TLS12, chachaTLS12}

func newScript(t testing.TB) *script {
	keys := NewKeys()
	return &script{t: t, keys: keys, log: keys.Writer(), client: NewClient(keys)}
}

// secretOf is a secret of the test, another one for each label.
func secretOf(label string, n int) []byte {
	return bytes.Repeat([]byte(label[len(label)-3:]+"!"), n)[:n]
}

func lineFor(label string, n int) string {
	return fmt.Sprintf("%s %x %x\n", label, testRandom, secretOf(label, n))
}

func (s *script) logSecret(label string, n int) { _, _ = io.WriteString(s.log, lineFor(label, n)) }

func vector(lengthBytes int, parts ...[]byte) []byte {
	all := bytes.Join(parts, nil)
	var length [8]byte
	binary.BigEndian.PutUint64(length[:], uint64(len(all)))
	return append(length[8-lengthBytes:], all...)
}

func record(kind byte, body []byte) []byte { return append([]byte{kind, 3, 3}, vector(2, body)...) }

func message(kind byte, body []byte) []byte { return append([]byte{kind}, vector(3, body)...) }

func extension(kind uint16, data []byte) []byte {
	return append([]byte{byte(kind >> 8), byte(kind)}, vector(2, data)...)
}

func clientHello(random [randomBytes]byte, name, alpn string, extensions ...[]byte) []byte {
	extensions = append([][]byte{
		extension(0, vector(2, []byte{0}, vector(2, []byte(name)))),
		extension(16, vector(2, vector(1, []byte(alpn)))),
		extension(43, vector(1, []byte{3, 4, 3, 3})),
	}, extensions...)
	return record(contentHandshake, message(1, bytes.Join([][]byte{
		{3, 3}, random[:], {0}, vector(2, []byte{0x13, 1, 0x13, 2, 0x13, 3, 0xc0, 0x2f}), {1, 0}, vector(2, extensions...),
	}, nil)))
}

func firstHello() []byte { return clientHello(testRandom, serverName, "h2") }

func serverHello(random [randomBytes]byte, suite uint16, version []byte, extensions ...[]byte) []byte {
	if version[1] == 4 {
		extensions = append(extensions, extension(43, version))
		version = []byte{3, 3}
	}
	return message(2, bytes.Join([][]byte{
		version, random[:], {0}, {byte(suite >> 8), byte(suite)}, {0}, vector(2, extensions...),
	}, nil))
}

var (
	tls12 = []byte{3, 3}
	tls13 = []byte{3, 4}
)

// retryRandom is SHA-256("HelloRetryRequest").
var retryRandom = [randomBytes]byte{
	0xcf, 0x21, 0xad, 0x74, 0xe5, 0x9a, 0x61, 0x11, 0xbe, 0x1d, 0x8c, 0x02, 0x1e, 0x65, 0xb8, 0x91,
	0xc2, 0xa2, 0x11, 0x16, 0x7a, 0xbb, 0x8c, 0x5e, 0x07, 0x9e, 0x09, 0xe2, 0xc8, 0xa8, 0x33, 0x9c,
}

var changeCipherSpec = record(contentChangeCipherSpec, []byte{1})

// try gives one record to the client.
func (s *script) try(b []byte) (Unit, error) {
	s.t.Helper()
	mine := bytes.Clone(b)
	n, u, err := s.client.Next(mine)
	if err != nil {
		var refused *wire.Error
		if err != wire.ErrShort && !errors.As(err, &refused) {
			s.t.Fatalf("an error of another kind: %v", err)
		}
		if _, _, again := s.client.Next(mine); err != wire.ErrShort && again != err {
			s.t.Fatalf("refused for %v, and then for %v", err, again)
		}
		return u, err
	}
	if n != len(b) {
		s.t.Fatalf("%d bytes taken of %d", n, len(b))
	}
	switch u.Kind {
	case KindData:
		s.sealed = s.client.Seal(s.sealed, u.Data)
	case KindControl:
		s.sealed = s.client.SealControl(s.sealed)
	}
	return u, nil
}

func (s *script) pass(b []byte, want UnitKind) Unit {
	s.t.Helper()
	u, err := s.try(b)
	if err != nil || u.Kind != want {
		s.t.Fatalf("a unit of kind %d where %d was expected: %v", u.Kind, want, err)
	}
	return u
}

func (s *script) refuse(b []byte, want policy.Reason) {
	s.t.Helper()
	u, err := s.try(b)
	var refused *wire.Error
	if !errors.As(err, &refused) || refused.Reason != want {
		s.t.Fatalf("%v, unit %+v, where %s was expected", err, u, want)
	}
}

// seal makes a record of the client's own.
func (s *script) seal(kind byte, content []byte) []byte { return s.sending.seal(nil, kind, content) }

func (s *script) traffic(number uint16, label string) {
	s.t.Helper()
	suite := suites[number]
	var err error
	if s.sending, err = suite.traffic(secretOf(label, suite.digest)); err != nil {
		s.t.Fatal(err)
	}
}

// greeted is behind both hellos.
func greetedBy(t testing.TB, hello []byte) *script {
	t.Helper()
	s := newScript(t)
	s.pass(firstHello(), KindHello)
	s.client.Inbound(record(contentHandshake, hello))
	return s
}

// finishing is where the Finished of TLS 1.3 comes next.
func finishingWith(t testing.TB, number uint16) *script {
	t.Helper()
	s := greetedBy(t, serverHello(serverRandom, number, tls13))
	s.pass(changeCipherSpec, KindPass)
	s.logSecret("CLIENT_HANDSHAKE_TRAFFIC_SECRET", suites[number].digest)
	s.traffic(number, "CLIENT_HANDSHAKE_TRAFFIC_SECRET")
	return s
}

func finishedOf(n int) []byte { return message(messageFinished, make([]byte, n)) }

// changedWith is where the Finished of TLS 1.2 comes next.
func changedWith(t testing.TB, number uint16) *script {
	t.Helper()
	s := greetedBy(t, serverHello(serverRandom, number, tls12))
	s.pass(record(contentHandshake, message(messageClientKeyExchange, make([]byte, 33))), KindPass)
	s.logSecret("CLIENT_RANDOM", secretMax)
	s.pass(changeCipherSpec, KindPass)
	var err error
	if s.sending, err = suites[number].client(secretOf("CLIENT_RANDOM", secretMax), testRandom, serverRandom); err != nil {
		t.Fatal(err)
	}
	if s.sending.suite.explicit > 0 {
		s.sending.explicit = 1 << 63 // OpenSSL begins anywhere
	}
	return s
}

// protectedBy is behind the handshake, whichever the version.
func protectedBy(t testing.TB, number uint16) *script {
	t.Helper()
	if !suites[number].tls13 {
		s := changedWith(t, number)
		s.pass(s.seal(contentHandshake, finishedOf(finishedBytes)), KindPass)
		return s
	}
	s := finishingWith(t, number)
	s.pass(s.seal(contentHandshake, finishedOf(suites[number].digest)), KindPass)
	s.logSecret("CLIENT_TRAFFIC_SECRET_0", suites[number].digest)
	s.traffic(number, "CLIENT_TRAFFIC_SECRET_0")
	return s
}

// reader is the server's side: it opens what left.
type reader struct {
	t testing.TB
	protection
}

func readerOf(s *script) *reader { return &reader{s.t, s.sending} }

type sealedRecord struct {
	kind    byte
	content string
	nonce   uint64
}

func (r *reader) all(b []byte) (got []sealedRecord) {
	r.t.Helper()
	for len(b) > 0 {
		n := headerBytes + int(binary.BigEndian.Uint16(b[3:]))
		content, kind, err := r.openInPlace(bytes.Clone(b[:n]))
		if err != nil {
			r.t.Fatal(err)
		}
		nonce := r.explicit
		if r.suite.explicit == 0 {
			nonce = 0
		}
		got = append(got, sealedRecord{kind, string(content), nonce})
		b = b[n:]
	}
	return got
}
