package tlsopen

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/sha256"
	"crypto/sha512"
	"hash"

	"golang.org/x/crypto/chacha20poly1305"

	"kalium.dev/kalium/runtime/internal/wire"
)

const (
	tagBytes      = 16
	nonceBytes    = 12
	saltBytes     = 4 // of a nonce of AES-GCM in TLS 1.2 (RFC 5288 section 3); the rest is in the record
	explicitBytes = nonceBytes - saltBytes
)

// suite is how records are protected. Suites without an AEAD, and CCM, have none.
type suite struct {
	tls13  bool
	chacha bool
	key    int // bytes
	hash   func() hash.Hash
	digest int // bytes of hash

	explicit int // bytes of the nonce that stand in each record
	overhead int // bytes by which a record's body is longer than its content: those, the tag, and in TLS 1.3 the type
}

var (
	aes128 = suite{key: 16, hash: sha256.New, digest: sha256.Size, explicit: explicitBytes, overhead: explicitBytes + tagBytes}
	aes256 = suite{key: 32, hash: sha512.New384, digest: sha512.Size384, explicit: explicitBytes, overhead: explicitBytes + tagBytes}
	chacha = suite{key: 32, hash: sha256.New, digest: sha256.Size, chacha: true, overhead: tagBytes}
)

// suites by number in the IANA registry "TLS Cipher Suites".
var suites = map[uint16]*suite{
	0x1301: {key: 16, hash: sha256.New, digest: sha256.Size, tls13: true, overhead: tagBytes + 1},
	0x1302: {key: 32, hash: sha512.New384, digest: sha512.Size384, tls13: true, overhead: tagBytes + 1},
	0x1303: {key: 32, hash: sha256.New, digest: sha256.Size, tls13: true, chacha: true, overhead: tagBytes + 1},

	// RSA, DHE-RSA, ECDHE-ECDSA and ECDHE-RSA.
	0x009c: &aes128, 0x009e: &aes128, 0xc02b: &aes128, 0xc02f: &aes128,
	0x009d: &aes256, 0x009f: &aes256, 0xc02c: &aes256, 0xc030: &aes256,
	0xccaa: &chacha, 0xcca9: &chacha, 0xcca8: &chacha,
}

func (s *suite) aead(key []byte) (cipher.AEAD, error) {
	if s.chacha {
		return chacha20poly1305.New(key)
	}
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	return cipher.NewGCM(block)
}

// expandLabel is HKDF-Expand-Label with an empty context (RFC 8446 section 7.1).
func (s *suite) expandLabel(secret []byte, label string, n int) ([]byte, error) {
	label = "tls13 " + label
	info := string([]byte{byte(n >> 8), byte(n), byte(len(label))}) + label + "\x00"
	return hkdf.Expand(s.hash, secret, info, n)
}

// expandMaster is the key block of TLS 1.2 (RFC 5246 sections 5 and 6.3).
func (s *suite) expandMaster(master []byte, client, server [randomBytes]byte, n int) []byte {
	seed := append([]byte("key expansion"), server[:]...)
	seed = append(seed, client[:]...)
	mac := hmac.New(s.hash, master)
	sum := func(parts ...[]byte) []byte {
		mac.Reset()
		for _, part := range parts {
			mac.Write(part)
		}
		return mac.Sum(nil)
	}
	var block []byte
	for a := sum(seed); len(block) < n; a = sum(a) {
		block = append(block, sum(a, seed)...)
	}
	return block[:n]
}

// traffic makes the protection under a traffic secret of TLS 1.3 (RFC 8446 section 7.3).
func (s *suite) traffic(logged []byte) (protection, error) {
	if len(logged) != s.digest {
		return protection{}, noKey("the logged secret is not one of the connection's cipher suite")
	}
	key, err := s.expandLabel(logged, "key", s.key)
	if err != nil {
		return protection{}, unusable(err)
	}
	iv, err := s.expandLabel(logged, "iv", nonceBytes)
	if err != nil {
		return protection{}, unusable(err)
	}
	p := protection{suite: s}
	p.setIV(iv)
	p.secret.n = copy(p.secret.bytes[:], logged)
	if p.aead, err = s.aead(key); err != nil {
		return protection{}, unusable(err)
	}
	return p, nil
}

// update makes the protection behind a KeyUpdate (RFC 8446 section 7.2).
func (p *protection) update() (protection, error) {
	next, err := p.suite.expandLabel(p.secret.bytes[:p.secret.n], "traffic upd", p.suite.digest)
	if err != nil {
		return protection{}, unusable(err)
	}
	return p.suite.traffic(next)
}

// client makes the client's protection under a master secret of TLS 1.2.
func (s *suite) client(master []byte, client, server [randomBytes]byte) (protection, error) {
	iv := saltBytes
	if s.chacha {
		iv = nonceBytes
	}
	// client_write_key, server_write_key, client_write_IV, server_write_IV; AEADs have no MAC keys.
	block := s.expandMaster(master, client, server, 2*(s.key+iv))
	p := protection{suite: s}
	p.setIV(block[2*s.key : 2*s.key+iv])
	var err error
	if p.aead, err = s.aead(block[:s.key]); err != nil {
		return protection{}, unusable(err)
	}
	return p, nil
}

// unusable says that Go's own cryptography does not do it, as its FIPS mode may decide.
func unusable(err error) error { return wire.Unsupported("the cipher suite: %v", err) }
