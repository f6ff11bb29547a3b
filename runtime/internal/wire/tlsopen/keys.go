package tlsopen

import (
	"bytes"
	"encoding/hex"
	"fmt"
	"io"
	"sync"
	"time"
)

// Bounds of what is remembered of a key log.
const (
	randomsMax   = 4096 // client randoms per sandbox: about 1 MiB
	unusedFor    = 60 * time.Second
	sweepPause   = time.Second // a full store is not searched again for each line of a flood
	lineBytesMax = 256         // the longest line that is needed has 193
	randomBytes  = 32
	secretMax    = 48 // SHA-384, and the master secret of TLS 1.2
)

// label is one of the kinds of secrets that are needed; the server's and the exporter's are not.
type label uint8

const (
	masterSecret label = iota
	handshakeSecret
	applicationSecret
	labels
)

// labelNames are those of the key log (RFC 9850, before it the NSS key log format).
var labelNames = map[string]label{
	"CLIENT_RANDOM":                   masterSecret,
	"CLIENT_HANDSHAKE_TRAFFIC_SECRET": handshakeSecret,
	"CLIENT_TRAFFIC_SECRET_0":         applicationSecret,
}

// Keys holds what the programs of one sandbox have logged. All of it is untrusted: a program may log what it likes, and
// when. So the first line for a label and a random stands, and the store is bounded. It may be used concurrently.
type Keys struct {
	now func() time.Time

	mu      sync.Mutex
	entries map[[randomBytes]byte]*entry // guarded by mu, like swept
	swept   time.Time
}

type entry struct {
	secrets [labels]secret
	holders int // connections that have begun and not yet taken all that they need
	since   time.Time
}

type secret struct {
	bytes [secretMax]byte
	n     int // 0: was not logged
}

// NewKeys makes the store of one sandbox.
func NewKeys() *Keys {
	return &Keys{now: time.Now, entries: map[[randomBytes]byte]*entry{}}
}

// Format prints no secret, with no verb.
func (k *Keys) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, "tlsopen.Keys") }

// find returns what is known of random. The caller has locked mu.
func (k *Keys) find(random [randomBytes]byte) *entry {
	now := k.now()
	e := k.entries[random]
	if e != nil && !e.expired(now) {
		return e
	}
	if e == nil && len(k.entries) >= randomsMax || now.Sub(k.swept) > unusedFor {
		k.sweep(now)
		if len(k.entries) >= randomsMax {
			return nil
		}
	}
	e = &entry{since: now}
	k.entries[random] = e
	return e
}

func (e *entry) expired(now time.Time) bool { return e.holders == 0 && now.Sub(e.since) > unusedFor }

func (k *Keys) sweep(now time.Time) {
	if now.Sub(k.swept) < sweepPause {
		return
	}
	k.swept = now
	for random, e := range k.entries {
		if e.expired(now) {
			delete(k.entries, random)
		}
	}
}

// hold keeps what is or will be logged for random until release. It fails when the store is full.
func (k *Keys) hold(random [randomBytes]byte) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	e := k.find(random)
	if e != nil {
		e.holders++
	}
	return e != nil
}

// release ends a hold. Nothing is kept that nobody holds and that was held.
func (k *Keys) release(random [randomBytes]byte) {
	k.mu.Lock()
	defer k.mu.Unlock()
	e := k.entries[random]
	if e == nil {
		return
	}
	if e.holders--; e.holders <= 0 {
		delete(k.entries, random)
	}
}

// get copies a secret; its n is 0 when none was logged.
func (k *Keys) get(random [randomBytes]byte, which label) secret {
	k.mu.Lock()
	defer k.mu.Unlock()
	if e := k.entries[random]; e != nil {
		return e.secrets[which]
	}
	return secret{}
}

// add takes one line. A line that says nothing of use is ignored.
func (k *Keys) add(line []byte) {
	name, rest, _ := bytes.Cut(bytes.TrimSuffix(line, []byte{'\r'}), []byte{' '})
	which, wanted := labelNames[string(name)]
	if !wanted {
		return
	}
	hexRandom, hexSecret, _ := bytes.Cut(rest, []byte{' '})
	var random [randomBytes]byte
	var s secret
	switch n := hex.DecodedLen(len(hexSecret)); {
	case len(hexRandom) != 2*randomBytes || len(hexSecret)%2 != 0:
		return
	case n != secretMax && (n != 32 || which == masterSecret):
		return
	default:
		s.n = n
	}
	if _, err := hex.Decode(random[:], hexRandom); err != nil {
		return
	}
	if _, err := hex.Decode(s.bytes[:], hexSecret); err != nil {
		return
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if e := k.find(random); e != nil && e.secrets[which].n == 0 {
		e.secrets[which] = s
	}
}

// KeyWriter is one open file of the key log.
type KeyWriter struct {
	keys *Keys

	mu   sync.Mutex
	line [lineBytesMax]byte // guarded by mu, like the fields below
	n    int
	skip bool // the rest of a line that is too long
}

// Writer opens the log.
func (k *Keys) Writer() *KeyWriter { return &KeyWriter{keys: k} }

// Format prints no secret, with no verb.
func (w *KeyWriter) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, "tlsopen.KeyWriter") }

// Write swallows p, whatever it is. A line counts when its newline has come, so that one may be cut over several writes.
func (w *KeyWriter) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for rest := p; len(rest) > 0; {
		end := bytes.IndexByte(rest, '\n')
		part := rest
		if end >= 0 {
			part = rest[:end]
		}
		if len(part) > len(w.line)-w.n {
			w.skip = true
		}
		if !w.skip {
			w.n += copy(w.line[w.n:], part)
		}
		if end < 0 {
			break
		}
		if !w.skip {
			w.keys.add(w.line[:w.n])
		}
		w.n, w.skip = 0, false
		rest = rest[end+1:]
	}
	return len(p), nil
}
