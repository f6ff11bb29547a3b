package policy

import (
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"strings"
)

// SignedFormat is the format of an envelope. It is also the prefix of the signed bytes, so that no signature over
// another kind of document is one over a policy.
const SignedFormat = "kalium-signed/v1"

const envelopeBytesMax = 1 << 20

// KeyID is the first 16 hexadecimal digits of the SHA-256 of the raw public key: it names the key in messages to
// people and decides nothing.
func KeyID(key ed25519.PublicKey) string {
	sum := sha256.Sum256(key)
	return hex.EncodeToString(sum[:8])
}

// Verify opens a signed envelope and parses the policy inside. Nothing inside is looked at before the signature over
// it holds. The version is not compared with anything: the caller keeps the highest one that it has seen.
func Verify(envelope []byte, key ed25519.PublicKey) (*Policy, error) {
	if len(key) != ed25519.PublicKeySize {
		return nil, signature("the operator's key has %d bytes, not %d", len(key), ed25519.PublicKeySize)
	}
	if len(envelope) > envelopeBytesMax {
		return nil, malformed("an envelope of %d bytes, at most %d", len(envelope), envelopeBytesMax)
	}
	document, err := decode(envelope)
	if err != nil {
		return nil, err
	}
	c := &checker{}
	fields := c.object(document, "the envelope", "format key_id policy signature", "")
	if c.err != nil {
		return nil, c.err
	}
	c.oneOf(fields["format"], "the envelope's format", SignedFormat)
	keyID := c.text(fields["key_id"], "the envelope's key_id", 64)
	compiled := c.base64(fields["policy"], "the envelope's policy")
	signed := c.base64(fields["signature"], "the envelope's signature")
	if c.err != nil {
		return nil, c.err
	}
	if keyID != KeyID(key) {
		return nil, signature("it names key %s, the operator's key is %s", keyID, KeyID(key))
	}
	message := append([]byte(SignedFormat+"\n"), compiled...)
	if len(signed) != ed25519.SignatureSize || !ed25519.Verify(key, message, signed) {
		return nil, signature("the signature does not hold under key %s", keyID)
	}
	return Parse(compiled)
}

func (c *checker) base64(value any, path string) []byte {
	text := c.text(value, path, envelopeBytesMax)
	data, err := base64.StdEncoding.Strict().DecodeString(text)
	// Even the strict decoder passes over line ends.
	if err != nil || strings.ContainsAny(text, "\r\n") {
		c.fail("%s is not base64", path)
	}
	return data
}

func signature(format string, args ...any) error {
	return &Error{Code: "policy.signature", Text: Printable(fmt.Sprintf(format, args...), MessageTextMax)}
}
