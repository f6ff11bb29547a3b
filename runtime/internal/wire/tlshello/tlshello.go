// Package tlshello reads the ClientHello at the front of a TLS stream (RFC 8446 sections 4.1.2 and 5.1, RFC 6066
// section 3, RFC 7301, RFC 9849).
package tlshello

import (
	"strings"

	"kalium.dev/kalium/runtime/internal/wire"
)

// Bounds of a hello and its parts.
const (
	HelloBytesMax = 16 * 1024 // headers included; real ones have 200 to 2,000 bytes
	recordsMax    = 8         // real clients use one record; a hello cut into single bytes is only an evasion
	namesMax      = 16
	hostBytesMax  = 255
)

// Extension numbers of the IANA registry "TLS ExtensionType Values".
const (
	extensionServerName        = 0
	extensionALPN              = 16
	extensionPreSharedKey      = 41
	extensionEarlyData         = 42
	extensionSupportedVersions = 43
	extensionECH               = 0xfe0d
	extensionECHFirst          = 0xfe08 // the numbers of the drafts before RFC 9849 begin here
	extensionESNI              = 0xffce // draft-ietf-tls-esni-06 and before
)

// Hello is what the guard judges of a ClientHello.
type Hello struct {
	SNI           string   // lower case, no final dot; "" when the extension is absent
	ALPN          []string // in the client's order
	EarlyData     bool     // the client means to send 0-RTT data, which nobody has judged
	ECH           bool     // an encrypted hello may hold another name
	RecordVersion uint16   // of the first record
	Version       uint16   // legacy_version
	Versions      []uint16 // supported_versions, in the client's order; empty before TLS 1.3
	Random        [32]byte
	SessionID     int // its length
}

// Parse reads the ClientHello at the front of b, which may be spread over several records. n counts all bytes of
// those records; the hello ends exactly at the end of the last one.
func Parse(b []byte) (hello Hello, n int, err error) {
	message, n, version, err := reassemble(b)
	if err != nil {
		return Hello{}, 0, err
	}
	hello, err = parseHello(message)
	if err != nil {
		return Hello{}, 0, err
	}
	hello.RecordVersion = version
	return hello, n, nil
}

// reassemble joins the handshake fragments of the leading records to one message without its four header bytes.
func reassemble(b []byte) (message []byte, n int, version uint16, err error) {
	var joined []byte
	want := 4
	for records := 0; ; records++ {
		if records == recordsMax {
			return nil, 0, 0, wire.Malformed("the hello is cut into more than %d records", recordsMax)
		}
		header := b[n:]
		// Each byte is refused as soon as it is there: a plaintext protocol must not be held until five bytes came.
		if len(header) > 0 && header[0] != 22 {
			return nil, 0, 0, wire.Malformed("record type %d where a handshake record is expected", header[0])
		}
		if len(header) > 1 && header[1] != 3 {
			return nil, 0, 0, wire.Malformed("record version %d.x", header[1])
		}
		if len(header) > 2 && (header[2] < 1 || header[2] > 3) {
			return nil, 0, 0, wire.Malformed("record version 3.%d", header[2])
		}
		if len(header) < 5 {
			return nil, 0, 0, wire.ErrShort
		}
		length := int(header[3])<<8 | int(header[4])
		if length == 0 {
			return nil, 0, 0, wire.Malformed("empty handshake record")
		}
		if n+5+length > HelloBytesMax {
			return nil, 0, 0, wire.TooLarge("the hello's records exceed %d bytes", HelloBytesMax)
		}
		fragment := header[5:]
		if len(fragment) > length {
			fragment = fragment[:length]
		}
		if records == 0 {
			version = uint16(header[1])<<8 | uint16(header[2])
			joined = fragment
		} else {
			joined = append(joined[:len(joined):len(joined)], fragment...)
		}
		if len(joined) > 0 && joined[0] != 1 {
			return nil, 0, 0, wire.Malformed("handshake message %d where a ClientHello is expected", joined[0])
		}
		if len(joined) >= 4 {
			want = 4 + (int(joined[1])<<16 | int(joined[2])<<8 | int(joined[3]))
			if want > HelloBytesMax {
				return nil, 0, 0, wire.TooLarge("a hello of %d bytes", want)
			}
		}
		if len(joined) > want && len(joined) >= 4 {
			return nil, 0, 0, wire.Malformed("bytes follow the ClientHello in its record")
		}
		if len(fragment) < length {
			return nil, 0, 0, wire.ErrShort
		}
		n += 5 + length
		if len(joined) >= 4 && len(joined) == want {
			return joined[4:], n, version, nil
		}
	}
}

func parseHello(message []byte) (Hello, error) {
	var hello Hello
	body := reader{rest: message}
	hello.Version = body.u16()
	copy(hello.Random[:], body.bytes(32))
	session := body.vector8()
	hello.SessionID = len(session)
	suites := body.vector16()
	compression := body.vector8()
	if body.failed || hello.Version>>8 != 3 || len(session) > 32 || len(suites) < 2 || len(suites)%2 != 0 {
		return Hello{}, wire.Malformed("the ClientHello's fixed part does not parse")
	}
	if len(compression) != 1 || compression[0] != 0 {
		return Hello{}, wire.Malformed("the ClientHello offers compression")
	}
	if len(body.rest) == 0 {
		return hello, nil // RFC 5246 section 7.4.1.2 allows a hello without extensions
	}
	extensions := reader{rest: body.vector16()}
	if body.failed || len(body.rest) != 0 {
		return Hello{}, wire.Malformed("the ClientHello's extensions do not fill its rest")
	}
	seen := map[uint16]bool{}
	for len(extensions.rest) > 0 {
		kind := extensions.u16()
		data := extensions.vector16()
		if extensions.failed {
			return Hello{}, wire.Malformed("an extension is cut")
		}
		// RFC 8446 section 4.2: at most one of a type. Two server names are two readings.
		if seen[kind] {
			return Hello{}, wire.Malformed("extension %d appears twice", kind)
		}
		seen[kind] = true
		if kind != extensionPreSharedKey && seen[extensionPreSharedKey] {
			return Hello{}, wire.Malformed("pre_shared_key is not the last extension")
		}
		if err := hello.extension(kind, data); err != nil {
			return Hello{}, err
		}
	}
	return hello, nil
}

func (h *Hello) extension(kind uint16, data []byte) error {
	r := reader{rest: data}
	switch kind {
	case extensionServerName:
		list := reader{rest: r.vector16()}
		nameType := list.byte()
		name := list.vector16()
		if r.failed || len(r.rest) != 0 || list.failed || len(list.rest) != 0 || nameType != 0 {
			return wire.Malformed("server_name does not hold exactly one host name")
		}
		host, err := hostName(name)
		if err != nil {
			return err
		}
		h.SNI = host
	case extensionALPN:
		list := reader{rest: r.vector16()}
		if r.failed || len(r.rest) != 0 || len(list.rest) == 0 {
			return wire.Malformed("the ALPN extension does not parse")
		}
		for len(list.rest) > 0 {
			name := list.vector8()
			if list.failed || len(name) == 0 {
				return wire.Malformed("the ALPN extension does not parse")
			}
			if len(h.ALPN) == namesMax {
				return wire.TooLarge("more than %d ALPN names", namesMax)
			}
			h.ALPN = append(h.ALPN, string(name))
		}
	case extensionSupportedVersions:
		list := reader{rest: r.vector8()}
		if r.failed || len(r.rest) != 0 || len(list.rest) == 0 || len(list.rest)%2 != 0 {
			return wire.Malformed("supported_versions does not parse")
		}
		for len(list.rest) > 0 {
			h.Versions = append(h.Versions, list.u16())
		}
	case extensionEarlyData:
		h.EarlyData = true
	}
	// A server may still speak a draft, and then the name inside is the one that counts.
	if kind >= extensionECHFirst && kind <= extensionECH || kind == extensionESNI {
		h.ECH = true
	}
	return nil
}

// hostName checks the name by RFC 6066 section 3: ASCII labels, no address, no trailing dot.
func hostName(name []byte) (string, error) {
	if len(name) == 0 || len(name) > hostBytesMax {
		return "", wire.Malformed("a server name of %d bytes", len(name))
	}
	label, digits := 0, 0 // bytes of the label, and how many of them are digits
	for _, c := range name {
		switch {
		case c == '.':
			if label == 0 {
				return "", wire.Malformed("the server name has an empty label")
			}
			label, digits = 0, 0
			continue
		case c >= '0' && c <= '9':
			digits++
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c == '-', c == '_':
		default:
			return "", wire.Malformed("the server name contains byte %#02x", c)
		}
		if label++; label > 63 {
			return "", wire.Malformed("a label of the server name is too long")
		}
	}
	if label == 0 {
		return "", wire.Malformed("the server name ends with a dot")
	}
	if digits == label { // no top-level domain is a number
		return "", wire.Malformed("the server name is an address")
	}
	return strings.ToLower(string(name)), nil
}

// reader takes fields from the front of rest. After a field that is not there, failed stays set and every further
// field is empty, so a caller may check once after several fields.
type reader struct {
	rest   []byte
	failed bool
}

func (r *reader) bytes(n int) []byte {
	if r.failed || len(r.rest) < n {
		r.failed, r.rest = true, nil
		return nil
	}
	field := r.rest[:n]
	r.rest = r.rest[n:]
	return field
}

func (r *reader) byte() byte {
	if field := r.bytes(1); field != nil {
		return field[0]
	}
	return 0
}

func (r *reader) u16() uint16 {
	if field := r.bytes(2); field != nil {
		return uint16(field[0])<<8 | uint16(field[1])
	}
	return 0
}

func (r *reader) vector8() []byte { return r.bytes(int(r.byte())) }

func (r *reader) vector16() []byte { return r.bytes(int(r.u16())) }
