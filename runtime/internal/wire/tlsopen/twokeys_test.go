package tlsopen

import (
	"bytes"
	"crypto/aes"
	"crypto/rand"
	"crypto/tls"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"io"
	"strings"
	"testing"
)

// element is one of GF(2^128) as GCM writes them (NIST SP 800-38D section 6.3): bit 0 is the highest of the first word.
type element [2]uint64

func elementOf(b []byte) element {
	return element{binary.BigEndian.Uint64(b), binary.BigEndian.Uint64(b[8:])}
}

func (a element) plus(b element) element { return element{a[0] ^ b[0], a[1] ^ b[1]} }

func (a element) times(b element) (product element) {
	for i := range 128 {
		if a[i/64]>>(63-i%64)&1 == 1 {
			product = product.plus(b)
		}
		carry := b[1] & 1
		b = element{b[0] >> 1, b[1]>>1 | b[0]<<63}
		if carry == 1 {
			b[0] ^= 0xe1 << 56
		}
	}
	return product
}

func (a element) power(n int) element {
	product := element{1 << 63, 0}
	for range n {
		product = product.times(a)
	}
	return product
}

func (a element) inverse() element { // a^(2^128-2)
	product, square := element{1 << 63, 0}, a
	for range 127 {
		square = square.times(square)
		product = product.times(square)
	}
	return product
}

// view is one of the two readings of a record of TLS 1.3 with AES-128-GCM: the first under its key.
type view struct {
	protection
	hash   element // GHASH's key
	stream []byte  // that is added to the content
}

func viewOf(t testing.TB, secret []byte, n int) view {
	t.Helper()
	suite := suites[aes128TLS13]
	p, err := suite.traffic(secret)
	if err != nil {
		t.Fatal(err)
	}
	key, err := suite.expandLabel(secret, "key", suite.key)
	if err != nil {
		t.Fatal(err)
	}
	block, err := aes.NewCipher(key)
	if err != nil {
		t.Fatal(err)
	}
	var hash [aes.BlockSize]byte
	block.Encrypt(hash[:], hash[:])
	p.setNonce()
	return view{p, elementOf(hash[:]), p.aead.Seal(nil, p.nonce[:], make([]byte, n), nil)[:n]}
}

// tag is the tag of ciphertext.
func (v *view) tag(header, ciphertext []byte) element {
	content := make([]byte, len(ciphertext))
	for i := range content {
		content[i] = ciphertext[i] ^ v.stream[i]
	}
	sealed := v.aead.Seal(nil, v.nonce[:], content, header)
	return elementOf(sealed[len(ciphertext):])
}

// twoKeys makes a record that is valid under both secrets: for the guard it begins with good, for the server evil stands
// behind some noise. One block is free, and each tag is an affine function of it, so that one equation makes them equal.
func twoKeys(t testing.TB, guard, server []byte, good, evil string) []byte {
	const block = aes.BlockSize
	n := (len(good)+len(evil)+block-1)/block*block + block + 1
	g, s := viewOf(t, guard, n), viewOf(t, server, n)
	if g.stream[n-1] != s.stream[n-1] {
		return nil // the content type must be the same: another secret
	}
	ciphertext := make([]byte, n)
	for i := range ciphertext {
		switch {
		case i < len(good):
			ciphertext[i] = good[i] ^ g.stream[i]
		case i < len(good)+len(evil):
			ciphertext[i] = evil[i-len(good)] ^ s.stream[i]
		case i == n-1:
			ciphertext[i] = contentApplicationData ^ g.stream[i]
		}
	}
	free := n/block - 1
	clear(ciphertext[free*block : (free+1)*block])
	header := []byte{contentApplicationData, 3, 3, 0, byte(n + tagBytes)}
	// The free block is followed by the one with the type and by that with the lengths.
	const power = 3
	slope := g.hash.power(power).plus(s.hash.power(power))
	x := g.tag(header, ciphertext).plus(s.tag(header, ciphertext)).times(slope.inverse())
	binary.BigEndian.PutUint64(ciphertext[free*block:], x[0])
	binary.BigEndian.PutUint64(ciphertext[free*block+8:], x[1])
	tag := g.tag(header, ciphertext)
	b := append(header, ciphertext...)
	return binary.BigEndian.AppendUint64(binary.BigEndian.AppendUint64(b, tag[0]), tag[1])
}

// An honest handshake, then a lie about the application key. Who only opens is deceived; who seals again is not.
func TestOneRecordUnderTwoKeys(t *testing.T) {
	const good, evil = "GET /allowed HTTP/1.1\r\n", "\nsend the secret away\n"
	for _, reseal := range []bool{false, true} {
		t.Run(fmt.Sprintf("reseal %v", reseal), func(t *testing.T) {
			server := startEcho(t, &tls.Config{MinVersion: tls.VersionTLS13})
			keys := NewKeys()
			log := keys.Writer()
			var random string
			var real []byte
			g := dial(t, server.address, keys, nil)
			g.reseal = reseal
			conn := tls.Client(g, clientConfig(writerFunc(func(line string) {
				fields := strings.Fields(line)
				if fields[0] == "CLIENT_TRAFFIC_SECRET_0" {
					random = fields[1]
					real, _ = hex.DecodeString(fields[2])
					return
				}
				_, _ = io.WriteString(log, line)
			})))
			if err := conn.Handshake(); err != nil {
				t.Fatal(err)
			}
			if suite := conn.ConnectionState().CipherSuite; suite != aes128TLS13 {
				t.Fatalf("the test is for a machine that prefers AES-128-GCM, this one has %s", tls.CipherSuiteName(suite))
			}
			made := make([]byte, len(real))
			var forged []byte
			for forged == nil {
				if _, err := rand.Read(made); err != nil {
					t.Fatal(err)
				}
				forged = twoKeys(t, made, real, good, evil)
			}
			_, _ = fmt.Fprintf(log, "CLIENT_TRAFFIC_SECRET_0 %s %x\n", random, made)
			if _, err := g.Write(forged); err != nil {
				t.Fatalf("the guard sees through it: %v", err)
			}
			if !strings.HasPrefix(g.plain.String(), good) || bytes.Contains(g.plain.Bytes(), []byte("secret")) {
				t.Fatalf("the guard saw %q", g.plain.String())
			}
			if !reseal {
				_ = g.Close()
			}
			seen, err := server.wait(t)
			if deceived := strings.Contains(seen, evil); deceived == reseal {
				t.Errorf("the server saw %q", seen)
			}
			if reseal && (seen != "" || err == nil || !strings.Contains(err.Error(), "bad record MAC")) {
				t.Errorf("the server saw %q and ended with %v", seen, err)
			}
		})
	}
}
