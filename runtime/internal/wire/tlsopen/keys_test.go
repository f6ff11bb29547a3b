package tlsopen

import (
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"testing"
	"time"

	"kalium.dev/kalium/runtime/internal/policy"
	"kalium.dev/kalium/runtime/internal/wire"
)

// What a program logs, and when, against a real server: either it fits, or nothing of the program's data leaves.
func TestKeysThatDoNotFit(t *testing.T) {
	drop := func(string) string { return "" }
	other := func(line string) string { // with another secret
		last := line[len(line)-2]
		return line[:len(line)-2] + string("0123456789abcdef"[(strings.IndexByte("0123456789abcdef", last)+1)%16]) + "\n"
	}
	short := func(line string) string { return line[:len(line)-3] + "\n" }
	for _, test := range []struct {
		name    string
		version uint16
		label   string
		change  func(line string) string
		refused bool
	}{
		{"no master secret", tls.VersionTLS12, "CLIENT_RANDOM", drop, true},
		{"another master secret", tls.VersionTLS12, "CLIENT_RANDOM", other, true},
		{"a short master secret", tls.VersionTLS12, "CLIENT_RANDOM", short, true},
		{"the right one first", tls.VersionTLS12, "CLIENT_RANDOM", func(line string) string { return line + other(line) }, false},
		{"the right one second", tls.VersionTLS12, "CLIENT_RANDOM", func(line string) string { return other(line) + line }, true},
		{"no handshake secret", tls.VersionTLS13, "CLIENT_HANDSHAKE_TRAFFIC_SECRET", drop, true},
		{"another handshake secret", tls.VersionTLS13, "CLIENT_HANDSHAKE_TRAFFIC_SECRET", other, true},
		{"the right handshake secret second", tls.VersionTLS13, "CLIENT_HANDSHAKE_TRAFFIC_SECRET", func(line string) string { return other(line) + line }, true},
		{"no application secret", tls.VersionTLS13, "CLIENT_TRAFFIC_SECRET_0", drop, true},
		{"another application secret", tls.VersionTLS13, "CLIENT_TRAFFIC_SECRET_0", other, true},
		{"a short application secret", tls.VersionTLS13, "CLIENT_TRAFFIC_SECRET_0", short, true},
		{"the right application secret first", tls.VersionTLS13, "CLIENT_TRAFFIC_SECRET_0", func(line string) string { return line + other(line) }, false},
		{"the right application secret second", tls.VersionTLS13, "CLIENT_TRAFFIC_SECRET_0", func(line string) string { return other(line) + line }, true},
		{"no server secrets", tls.VersionTLS13, "SERVER_TRAFFIC_SECRET_0", drop, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			server := startEcho(t, &tls.Config{MaxVersion: test.version})
			keys := NewKeys()
			log := keys.Writer()
			g := dial(t, server.address, keys, nil)
			conn := tls.Client(g, clientConfig(writerFunc(func(line string) {
				if strings.HasPrefix(line, test.label+" ") {
					line = test.change(line)
				}
				_, _ = io.WriteString(log, line)
			})))
			if !test.refused {
				exchange(t, conn, parts()...)
				return
			}
			_, err := conn.Write([]byte("data"))
			var refused *wire.Error
			if !errors.As(g.refused, &refused) || refused.Reason != policy.ReasonNoKey {
				t.Fatalf("refused with %v, the write with %v", g.refused, err)
			}
			if seen, _ := server.wait(t); seen != "" || g.plain.Len() != 0 {
				t.Errorf("the server saw %q, the guard %q", seen, g.plain.String())
			}
		})
	}
}

func TestALateKeyIsTooLate(t *testing.T) {
	s := greetedBy(t, serverHello(serverRandom, aes128TLS13, tls13))
	s.traffic(aes128TLS13, "CLIENT_HANDSHAKE_TRAFFIC_SECRET")
	b := s.seal(contentHandshake, finishedOf(32))
	s.refuse(b, policy.ReasonNoKey)
	s.logSecret("CLIENT_HANDSHAKE_TRAFFIC_SECRET", 32)
	s.refuse(b, policy.ReasonNoKey)
}

func lineOf(label string, random uint32, fill byte, n int) string {
	return fmt.Sprintf("%s %064x %s\n", label, random, strings.Repeat(fmt.Sprintf("%02x", fill), n))
}

func randomOf(n uint32) (random [randomBytes]byte) {
	binary.BigEndian.PutUint32(random[randomBytes-4:], n)
	return random
}

func TestKeyLines(t *testing.T) {
	good := lineOf("CLIENT_RANDOM", 7, 0xab, 48)
	for name, test := range map[string]struct {
		lines string
		want  bool
	}{
		"whole":                  {good, true},
		"upper case":             {"CLIENT_RANDOM" + strings.ToUpper(good[13:]), true},
		"carriage return":        {good[:len(good)-1] + "\r\n", true},
		"behind others":          {"# a comment\n\nSERVER_TRAFFIC_SECRET_0 1 2\n" + good, true},
		"behind a long one":      {strings.Repeat("x", 3*lineBytesMax) + "\n" + good, true},
		"behind garbage":         {"\x00\xff \n" + good, true},
		"no newline":             {good[:len(good)-1], false},
		"joined to a long one":   {strings.Repeat("x", 3*lineBytesMax) + good, false},
		"another label":          {"X" + good, false},
		"early secret":           {"CLIENT_EARLY_TRAFFIC_SECRET" + good[13:], false},
		"two spaces":             {"CLIENT_RANDOM " + good[13:], false},
		"tail":                   {good[:len(good)-1] + " x\n", false},
		"short random":           {strings.Replace(good, " 0", " ", 1), false},
		"long random":            {strings.Replace(good, " 0", " 000", 1), false},
		"no hex in the random":   {strings.Replace(good, " 0", " g", 1), false},
		"no hex in the secret":   {strings.Replace(good, "ab", "xy", 1), false},
		"odd secret":             {good[:len(good)-2] + "\n", false},
		"master secret of 32":    {lineOf("CLIENT_RANDOM", 7, 0xab, 32), false},
		"secret of 64":           {lineOf("CLIENT_RANDOM", 7, 0xab, 64), false},
		"empty secret":           {lineOf("CLIENT_RANDOM", 7, 0xab, 0), false},
		"label alone":            {"CLIENT_RANDOM\n", false},
		"random alone":           {good[:78] + "\n", false},
		"space behind the label": {"CLIENT_RANDOM \n", false},
	} {
		for _, piece := range []int{1, 5, 10000} {
			keys := NewKeys()
			log := keys.Writer()
			for rest := test.lines; len(rest) > 0; {
				n, err := io.WriteString(log, rest[:min(piece, len(rest))])
				if err != nil || n != min(piece, len(rest)) {
					t.Fatalf("%s: %d bytes swallowed: %v", name, n, err)
				}
				rest = rest[n:]
			}
			s := keys.get(randomOf(7), masterSecret)
			if got := s.n == 48 && s.bytes[0] == 0xab; got != test.want || len(keys.entries) > 1 || !test.want && len(keys.entries) > 0 {
				t.Errorf("%s, in pieces of %d: known is %v", name, piece, got)
			}
		}
	}
}

func TestTwoFilesDoNotMixTheirLines(t *testing.T) {
	keys := NewKeys()
	a, b := keys.Writer(), keys.Writer()
	first, second := lineOf("CLIENT_RANDOM", 1, 1, 48), lineOf("CLIENT_RANDOM", 2, 2, 48)
	for i := range first {
		_, _ = io.WriteString(a, first[i:i+1])
		_, _ = io.WriteString(b, second[i:i+1])
	}
	for n := range uint32(2) {
		if s := keys.get(randomOf(n+1), masterSecret); s.n != 48 || s.bytes[47] != byte(n+1) {
			t.Errorf("random %d: %d bytes", n+1, s.n)
		}
	}
}

func TestKeyStoreFlood(t *testing.T) {
	clock := time.Unix(1e9, 0)
	keys := NewKeys()
	keys.now = func() time.Time { return clock }
	log := keys.Writer()
	known := func(n uint32) bool { return keys.get(randomOf(n), masterSecret).n > 0 }
	add := func(n uint32) { _, _ = io.WriteString(log, lineOf("CLIENT_RANDOM", n, 1, 48)) }

	add(0)
	if !keys.hold(randomOf(0)) {
		t.Fatal("an empty store is full")
	}
	for n := range uint32(2 * randomsMax) {
		add(n)
	}
	if len(keys.entries) != randomsMax || !known(randomsMax-1) || known(randomsMax) {
		t.Fatalf("%d randoms", len(keys.entries))
	}
	if keys.hold(randomOf(2 * randomsMax)) {
		t.Error("a full store takes a connection")
	}
	client := NewClient(keys)
	if _, _, err := client.Next(firstHello()); err == nil || err.(*wire.Error).Reason != policy.ReasonNoKey {
		t.Errorf("a hello at a full store: %v", err)
	}

	clock = clock.Add(unusedFor + time.Second)
	add(randomsMax)
	if len(keys.entries) != 2 || !known(0) || !known(randomsMax) || known(1) {
		t.Errorf("%d randoms after a minute", len(keys.entries))
	}
	keys.release(randomOf(0))
	if known(0) {
		t.Error("what was released stays")
	}
	keys.release(randomOf(0))

	clock = clock.Add(unusedFor + time.Second)
	if !keys.hold(randomOf(randomsMax)) || known(randomsMax) {
		t.Error("an expired key counts for a connection")
	}
}

// Two connections that say the same random do not end each other's keys.
func TestHoldersAreCounted(t *testing.T) {
	keys := NewKeys()
	_, _ = io.WriteString(keys.Writer(), lineOf("CLIENT_RANDOM", 1, 1, 48))
	for range 2 {
		keys.hold(randomOf(1))
	}
	keys.release(randomOf(1))
	if keys.get(randomOf(1), masterSecret).n == 0 {
		t.Error("the first end took the key of the second")
	}
}

func TestKeysAreConcurrent(t *testing.T) {
	keys := NewKeys()
	var group sync.WaitGroup
	for worker := range uint32(8) {
		group.Go(func() {
			log := keys.Writer()
			for n := range uint32(200) {
				random := worker<<16 | n
				keys.hold(randomOf(random))
				_, _ = io.WriteString(log, lineOf("CLIENT_RANDOM", random, 1, 48))
				if keys.get(randomOf(random), masterSecret).n == 0 {
					t.Error("a key is missing")
				}
				keys.release(randomOf(random))
			}
		})
	}
	group.Wait()
	if len(keys.entries) != 0 {
		t.Errorf("%d randoms stay", len(keys.entries))
	}
}
