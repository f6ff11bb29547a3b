package tlshello

import (
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"net"
	"slices"
	"strings"
	"testing"

	"kalium.dev/kalium/runtime/internal/policy"
	"kalium.dev/kalium/runtime/internal/wire"
)

// recorded is a ClientHello as Go's client sends it.
func recorded(t testing.TB, config *tls.Config) []byte {
	t.Helper()
	client, server := net.Pipe()
	defer server.Close()
	go func() {
		// Ends when the server's side is closed.
		_ = tls.Client(client, config).HandshakeContext(context.Background())
		_ = client.Close()
	}()
	header := make([]byte, 5)
	if _, err := readFull(server, header); err != nil {
		t.Fatal(err)
	}
	body := make([]byte, binary.BigEndian.Uint16(header[3:]))
	if _, err := readFull(server, body); err != nil {
		t.Fatal(err)
	}
	return append(header, body...)
}

func readFull(conn net.Conn, b []byte) (int, error) {
	n := 0
	for n < len(b) {
		m, err := conn.Read(b[n:])
		if err != nil {
			return n, err
		}
		n += m
	}
	return n, nil
}

// spec describes a hello; build writes it, whatever it says.
type spec struct {
	version     uint16
	session     []byte
	suites      []byte
	compression []byte
	extensions  [][]byte // nil: no block at all
	tail        []byte   // behind the extensions
}

func good(extensions ...[]byte) spec {
	return spec{version: 0x0303, suites: []byte{0x13, 0x01}, compression: []byte{0}, extensions: extensions}
}

func (s spec) message() []byte {
	body := binary.BigEndian.AppendUint16(nil, s.version)
	body = append(body, make([]byte, 32)...)
	body = append(append(body, byte(len(s.session))), s.session...)
	body = append(binary.BigEndian.AppendUint16(body, uint16(len(s.suites))), s.suites...)
	body = append(append(body, byte(len(s.compression))), s.compression...)
	if s.extensions != nil {
		block := slices.Concat(s.extensions...)
		body = append(binary.BigEndian.AppendUint16(body, uint16(len(block))), block...)
	}
	body = append(body, s.tail...)
	return append([]byte{1, byte(len(body) >> 16), byte(len(body) >> 8), byte(len(body))}, body...)
}

func record(fragment []byte) []byte {
	return append([]byte{22, 3, 1, byte(len(fragment) >> 8), byte(len(fragment))}, fragment...)
}

func (s spec) build() []byte { return record(s.message()) }

func extension(kind uint16, data []byte) []byte {
	out := binary.BigEndian.AppendUint16(nil, kind)
	return append(binary.BigEndian.AppendUint16(out, uint16(len(data))), data...)
}

func vector16(data []byte) []byte {
	return append(binary.BigEndian.AppendUint16(nil, uint16(len(data))), data...)
}

func nameEntry(kind byte, name string) []byte { return append([]byte{kind}, vector16([]byte(name))...) }

func sni(name string) []byte { return extension(extensionServerName, vector16(nameEntry(0, name))) }

func TestTheHelloOfARealClientIsRead(t *testing.T) {
	for name, config := range map[string]*tls.Config{
		"TLS 1.3":        {ServerName: "Images.Kalium.test", NextProtos: []string{"h2", "http/1.1"}, MinVersion: tls.VersionTLS13},
		"TLS 1.2":        {ServerName: "Images.Kalium.test", NextProtos: []string{"h2", "http/1.1"}, MaxVersion: tls.VersionTLS12},
		"TLS 1.2 or 1.3": {ServerName: "Images.Kalium.test", NextProtos: []string{"h2", "http/1.1"}},
	} {
		data := recorded(t, config)

		hello, n, err := Parse(append(slices.Clone(data), "more"...))

		if err != nil || n != len(data) || hello.SNI != "images.kalium.test" || !slices.Equal(hello.ALPN, []string{"h2", "http/1.1"}) ||
			hello.ECH || hello.EarlyData || hello.Version != tls.VersionTLS12 || hello.Random == [32]byte{} {
			t.Errorf("%s: %#v, %d of %d bytes, %v", name, hello, n, len(data), err)
		}
		if (config.MaxVersion == 0) != slices.Contains(hello.Versions, tls.VersionTLS13) {
			t.Errorf("%s: versions %x", name, hello.Versions)
		}
		for i := range data {
			if _, _, err := Parse(data[:i]); err != wire.ErrShort {
				t.Fatalf("%s, %d bytes: %v", name, i, err)
			}
		}
	}
}

func TestAHelloOverSeveralRecordsIsTheSameHello(t *testing.T) {
	message := good(sni("images.test")).message()
	for cut := 1; cut < len(message); cut++ {
		data := append(record(message[:cut]), record(message[cut:])...)

		hello, n, err := Parse(data)

		if err != nil || n != len(data) || hello.SNI != "images.test" {
			t.Errorf("cut at %d: %#v, %d bytes, %v", cut, hello, n, err)
		}
		if _, _, err := Parse(data[:len(data)-1]); err != wire.ErrShort {
			t.Errorf("cut at %d, without the last byte: %v", cut, err)
		}
	}
	var pieces []byte
	for piece := range slices.Chunk(message, len(message)/recordsMax+1) {
		pieces = append(pieces, record(piece)...)
	}
	if hello, _, err := Parse(pieces); err != nil || hello.SNI != "images.test" {
		t.Errorf("%d records: %#v, %v", recordsMax, hello, err)
	}
}

func TestWhatHidesInAHelloIsSaid(t *testing.T) {
	for name, c := range map[string]struct {
		extension []byte
		ech       bool
		early     bool
	}{
		"nothing":         {sni("a.test"), false, false},
		"early data":      {extension(42, nil), false, true},
		"ECH":             {extension(0xfe0d, []byte{1}), true, false},
		"ECH of draft 10": {extension(0xfe0a, []byte{1}), true, false},
		"ESNI":            {extension(0xffce, []byte{1}), true, false},
		"a grease value":  {extension(0x0a0a, nil), false, false},
	} {
		hello, _, err := Parse(good(c.extension).build())
		if err != nil || hello.ECH != c.ech || hello.EarlyData != c.early {
			t.Errorf("%s: %#v, %v", name, hello, err)
		}
	}
	if hello, _, err := Parse(good().build()); err != nil || hello.SNI != "" {
		t.Errorf("no extension: %#v, %v", hello, err)
	}
	without := good()
	without.extensions = nil
	if hello, _, err := Parse(without.build()); err != nil || hello.SNI != "" {
		t.Errorf("no block of extensions: %#v, %v", hello, err)
	}
}

func TestWhatIsNoHelloOrTwoIsRefused(t *testing.T) {
	message := good(sni("a.test")).message()
	long := strings.Repeat("a", 63)
	change := func(change func(*spec)) []byte {
		s := good(sni("a.test"))
		change(&s)
		return s.build()
	}
	for name, c := range map[string]struct {
		data   []byte
		reason policy.Reason
	}{
		"HTTP":                       {[]byte("GET"), "malformed"},
		"MySQL":                      {[]byte{0x4a, 0, 0, 1}, "malformed"},
		"application data":           {[]byte{23}, "malformed"},
		"an alert":                   {[]byte{21, 3, 1, 0, 2, 1, 0}, "malformed"},
		"an SSL 2 hello":             {[]byte{0x80, 0x2e, 1, 3, 1}, "malformed"},
		"record version 2":           {[]byte{22, 2}, "malformed"},
		"record version 3.0":         {[]byte{22, 3, 0}, "malformed"},
		"record version 3.4":         {[]byte{22, 3, 4}, "malformed"},
		"an empty record":            {[]byte{22, 3, 1, 0, 0}, "malformed"},
		"an empty record between":    {slices.Concat(record(message[:10]), []byte{22, 3, 1, 0, 0}), "malformed"},
		"an alert between":           {slices.Concat(record(message[:10]), []byte{21, 3, 1, 0, 2}), "malformed"},
		"a record beyond the bound":  {[]byte{22, 3, 1, 0x40, 0}, "too_large"},
		"a hello beyond the bound":   {[]byte{22, 3, 1, 0, 4, 1, 0, 0x40, 0}, "too_large"},
		"a hello of 16 MiB":          {[]byte{22, 3, 1, 0, 4, 1, 0xff, 0xff, 0xff}, "too_large"},
		"a ServerHello":              {record([]byte{2, 0, 0, 0}), "malformed"},
		"a second message behind it": {record(append(slices.Clone(message), 1)), "malformed"},
		"nine records":               {slices.Concat(slices.Repeat(record(message[:1]), 1), slices.Repeat(record([]byte{0}), 8)), "malformed"},
		"an empty hello":             {record([]byte{1, 0, 0, 0}), "malformed"},
		"version 2":                  {change(func(s *spec) { s.version = 0x0200 }), "malformed"},
		"a session of 33 bytes":      {change(func(s *spec) { s.session = make([]byte, 33) }), "malformed"},
		"no suites":                  {change(func(s *spec) { s.suites = nil }), "malformed"},
		"half a suite":               {change(func(s *spec) { s.suites = []byte{1, 2, 3} }), "malformed"},
		"compression":                {change(func(s *spec) { s.compression = []byte{1, 0} }), "malformed"},
		"no compression":             {change(func(s *spec) { s.compression = nil }), "malformed"},
		"bytes behind it":            {change(func(s *spec) { s.tail = []byte{0} }), "malformed"},
		"an extension cut":           {change(func(s *spec) { s.extensions = [][]byte{{0, 0, 0}} }), "malformed"},
		"an extension too long":      {change(func(s *spec) { s.extensions = [][]byte{{0, 99, 0, 9, 1}} }), "malformed"},
		"two server names":           {good(sni("a.test"), sni("b.test")).build(), "malformed"},
		"two names in one":           {good(extension(0, vector16(append(nameEntry(0, "a.test"), nameEntry(0, "b.test")...)))).build(), "malformed"},
		"a name of another type":     {good(extension(0, vector16(nameEntry(1, "a.test")))).build(), "malformed"},
		"an empty list of names":     {good(extension(0, vector16(nil))).build(), "malformed"},
		"an empty server_name":       {good(extension(0, nil)).build(), "malformed"},
		"bytes behind the names":     {good(extension(0, append(vector16(nameEntry(0, "a.test")), 0))).build(), "malformed"},
		"an empty name":              {good(sni("")).build(), "malformed"},
		"a name with a final dot":    {good(sni("a.test.")).build(), "malformed"},
		"a name with an empty label": {good(sni("a..test")).build(), "malformed"},
		"a name with a dot before":   {good(sni(".a.test")).build(), "malformed"},
		"a name with a zero byte":    {good(sni("a.test\x00.b")).build(), "malformed"},
		"a name with a space":        {good(sni("a .test")).build(), "malformed"},
		"a name with a port":         {good(sni("a.test:443")).build(), "malformed"},
		"a name beyond ASCII":        {good(sni("ä.test")).build(), "malformed"},
		"a wildcard":                 {good(sni("*.test")).build(), "malformed"},
		"an address":                 {good(sni("10.0.0.1")).build(), "malformed"},
		"an IPv6 address":            {good(sni("[::1]")).build(), "malformed"},
		"a number":                   {good(sni("2130706433")).build(), "malformed"},
		"a label of 64 bytes":        {good(sni(long + "a.test")).build(), "malformed"},
		"a name of 256 bytes":        {good(sni(strings.Repeat(long+".", 4))).build(), "malformed"},
		"an empty ALPN":              {good(extension(16, nil)).build(), "malformed"},
		"an ALPN of nothing":         {good(extension(16, vector16(nil))).build(), "malformed"},
		"an ALPN of an empty name":   {good(extension(16, vector16([]byte{0}))).build(), "malformed"},
		"an ALPN cut":                {good(extension(16, vector16([]byte{3, 'h', '2'}))).build(), "malformed"},
		"17 ALPN names":              {good(extension(16, vector16(slices.Repeat([]byte{1, 'a'}, 17)))).build(), "too_large"},
		"versions cut":               {good(extension(43, []byte{3, 3, 4, 3})).build(), "malformed"},
		"no versions":                {good(extension(43, []byte{0})).build(), "malformed"},
		"bytes behind versions":      {good(extension(43, []byte{2, 3, 4, 0})).build(), "malformed"},
		"a key that is not last":     {good(extension(41, nil), sni("a.test")).build(), "malformed"},
	} {
		hello, n, err := Parse(c.data)

		var refused *wire.Error
		if n != 0 || hello.SNI != "" || !errors.As(err, &refused) || refused.Reason != c.reason {
			t.Errorf("%s: %#v, %d bytes, %v; want %s", name, hello, n, err, c.reason)
		}
	}
}

func TestNamesThatHostsHavePass(t *testing.T) {
	for _, name := range []string{"a", "localhost", "a.test", "A-1.b_2.Test", "1.2.3.4.in-addr.arpa", "xn--bcher-kva.example", "1a", "3com.example"} {
		if hello, _, err := Parse(good(sni(name)).build()); err != nil || hello.SNI != strings.ToLower(name) {
			t.Errorf("%q: %q, %v", name, hello.SNI, err)
		}
	}
}

// FuzzParse: only the declared errors come out, a hello is read once, and Go's server reads the same name.
func FuzzParse(f *testing.F) {
	f.Add(recorded(f, &tls.Config{ServerName: "images.test", NextProtos: []string{"h2"}}))
	f.Add(recorded(f, &tls.Config{ServerName: "images.test", MaxVersion: tls.VersionTLS12}))
	message := good(sni("a.test"), extension(16, vector16([]byte{2, 'h', '2'})), extension(43, []byte{2, 3, 4}), extension(41, nil)).message()
	f.Add(record(message))
	f.Add(append(record(message[:20]), record(message[20:])...))
	f.Fuzz(func(t *testing.T, data []byte) {
		hello, n, err := Parse(data)
		if err != nil {
			var refused *wire.Error
			if err != wire.ErrShort && !errors.As(err, &refused) {
				t.Fatalf("error of another kind: %v", err)
			}
			return
		}
		if n > len(data) || n > HelloBytesMax || len(hello.SNI) > hostBytesMax {
			t.Fatalf("%d of %d bytes, %#v", n, len(data), hello)
		}
		if _, _, err := Parse(data[:n-1]); err != wire.ErrShort {
			t.Fatalf("without the last byte: %v", err)
		}
		name, read := nameAtGo(data[:n])
		if read && strings.ToLower(name) != hello.SNI {
			t.Fatalf("Go's server reads the name %q, this %q", name, hello.SNI)
		}
	})
}

var errSeen = errors.New("the hello was read")

// nameAtGo is the server name that Go's server finds, if it takes the hello at all.
func nameAtGo(data []byte) (name string, read bool) {
	client, server := net.Pipe()
	defer client.Close()
	go func() {
		_, _ = client.Write(data) // fails when the server has stopped reading
		_ = client.Close()
	}()
	// The server's alert has no reader; the pipe is closed by then or the write fails.
	conn := tls.Server(server, &tls.Config{GetConfigForClient: func(info *tls.ClientHelloInfo) (*tls.Config, error) {
		name, read = info.ServerName, true
		_ = server.Close()
		return nil, errSeen
	}})
	_ = conn.HandshakeContext(context.Background())
	_ = server.Close()
	return name, read
}
