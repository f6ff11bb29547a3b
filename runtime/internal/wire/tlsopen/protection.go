package tlsopen

import (
	"crypto/cipher"
	"encoding/binary"
	"slices"

	"kalium.dev/kalium/runtime/internal/policy"
	"kalium.dev/kalium/runtime/internal/wire"
)

// Content types of RFC 8446 section 5.1.
const (
	contentChangeCipherSpec = 20
	contentAlert            = 21
	contentHandshake        = 22
	contentApplicationData  = 23
)

const (
	headerBytes    = 5
	fragmentBytes  = 16 * 1024            // of content in a record
	recordBytesMax = fragmentBytes + 2048 // RFC 5246 section 6.2.3; what each suite needs is less
)

// protection is one direction's record protection under one key.
type protection struct {
	suite    *suite
	aead     cipher.AEAD
	sequence uint64
	mask     uint64 // the tail of the IV, which the sequence number is added to
	explicit uint64 // TLS 1.2 with AES-GCM: the nonce's part that the last record carried or, to seal, the next one will
	secret   secret // TLS 1.3

	// Arguments of a call through an interface escape: in here they need no allocation.
	nonce      [nonceBytes]byte // begins as the IV does
	additional [13]byte
}

func (p *protection) setIV(iv []byte) {
	copy(p.nonce[:], iv)
	p.mask = binary.BigEndian.Uint64(p.nonce[saltBytes:])
}

func noKey(text string) error { return &wire.Error{Reason: policy.ReasonNoKey, Text: text} }

var errDoesNotOpen = noKey("a record that does not open under the logged key")

// setNonce follows RFC 8446 section 5.3, which is RFC 7905 section 2 as well, or RFC 5288 section 3.
func (p *protection) setNonce() {
	tail := p.mask ^ p.sequence
	if p.suite.explicit > 0 {
		tail = p.explicit
	}
	binary.BigEndian.PutUint64(p.nonce[saltBytes:], tail)
}

// setAdditional is for content of n bytes; header is the record's.
func (p *protection) setAdditional(header []byte, n int) []byte {
	if p.suite.tls13 {
		return p.additional[:copy(p.additional[:], header[:headerBytes])]
	}
	binary.BigEndian.PutUint64(p.additional[:], p.sequence)
	copy(p.additional[8:], header[:3])
	binary.BigEndian.PutUint16(p.additional[11:], uint16(n))
	return p.additional[:]
}

// openInPlace opens a whole record, header included; content lies in it. When the record does not open, its body is
// lost.
func (p *protection) openInPlace(record []byte) (content []byte, kind byte, err error) {
	from := headerBytes + p.suite.explicit
	if len(record) < headerBytes+p.suite.overhead || len(record) > headerBytes+p.suite.overhead+fragmentBytes {
		return nil, 0, wire.Malformed("an encrypted record of %d bytes", len(record)-headerBytes)
	}
	if p.suite.explicit > 0 {
		p.explicit = binary.BigEndian.Uint64(record[headerBytes:])
	}
	p.setNonce()
	sealed := record[from:]
	content, err = p.aead.Open(sealed[:0], p.nonce[:], sealed, p.setAdditional(record, len(sealed)-tagBytes))
	if err != nil {
		return nil, 0, errDoesNotOpen
	}
	p.sequence++
	kind = record[0]
	if p.suite.tls13 {
		last := len(content) - 1
		if content, kind = content[:last], content[last]; kind == 0 {
			return nil, 0, wire.Unsupported("a padded record")
		}
	}
	return content, kind, nil
}

// seal appends one record to dst, which must not overlap content.
func (p *protection) seal(dst []byte, kind byte, content []byte) []byte {
	body := len(content) + p.suite.overhead
	dst = slices.Grow(dst, headerBytes+body)
	at := len(dst)
	outer := kind
	if p.suite.tls13 {
		outer = contentApplicationData
	}
	dst = append(dst, outer, 3, 3, byte(body>>8), byte(body))
	p.setNonce()
	dst = append(dst, p.nonce[nonceBytes-p.suite.explicit:]...)
	from := len(dst)
	dst = append(dst, content...)
	if p.suite.tls13 {
		dst = append(dst, kind)
	}
	dst = p.aead.Seal(dst[:from], p.nonce[:], dst[from:], p.setAdditional(dst[at:], len(content)))
	p.sequence++
	p.explicit++
	return dst
}
