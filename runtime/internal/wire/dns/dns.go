// Package dns reads the queries of a sandbox's resolver and writes the guard's answers (RFC 1035, RFC 6891).
package dns

import (
	"net/netip"

	"kalium.dev/kalium/runtime/internal/wire"
)

// Bounds and codes of RFC 1035 section 4.1 and RFC 3596.
const (
	QueryBytesMax = 512 // section 4.2.1; a query with one question and an OPT record is far below it
	nameBytesMax  = 255
	labelBytesMax = 63
	headerBytes   = 12

	TypeA    = 1
	TypeAAAA = 28
	ClassIN  = 1

	typeOPT = 41

	rcodeNXDomain = 3
	// The header, the longest question and so many A records of 16 bytes stay within 512 bytes.
	answersMax = (QueryBytesMax - headerBytes - nameBytesMax - 4) / 16
)

// Query is the one question of a query.
type Query struct {
	ID          uint16
	Name        string // lower case, no final dot; "" is the root
	Type, Class uint16
}

// ParseQuery reads a whole datagram. It accepts a standard query with exactly one question and at most one OPT record
// (RFC 6891); the name's labels must be letters, digits, '-' and '_', so that the name can be compared and logged.
func ParseQuery(b []byte) (Query, error) {
	query, _, err := parse(b)
	return query, err
}

// parse also returns where the question ends, because answers repeat it byte for byte (some resolvers compare case).
func parse(b []byte) (Query, int, error) {
	if len(b) > QueryBytesMax {
		return Query{}, 0, wire.TooLarge("dns query of %d bytes", len(b))
	}
	if len(b) < headerBytes {
		return Query{}, 0, wire.Malformed("dns datagram of %d bytes", len(b))
	}
	flags := uint16(b[2])<<8 | uint16(b[3])
	// QR, opcode, TC and RCODE must be zero. RD, AD and CD are the asker's wishes; the guard decides nothing by them.
	if flags&0xfa0f != 0 {
		return Query{}, 0, wire.Malformed("dns flags %#04x are not those of a standard query", flags)
	}
	questions, answers := u16(b[4:]), u16(b[6:])
	authorities, additionals := u16(b[8:]), u16(b[10:])
	if questions != 1 || answers != 0 || authorities != 0 || additionals > 1 {
		return Query{}, 0, wire.Malformed("dns sections %d/%d/%d/%d", questions, answers, authorities, additionals)
	}
	name, at, err := parseName(b, headerBytes)
	if err != nil {
		return Query{}, 0, err
	}
	if len(b) < at+4 {
		return Query{}, 0, wire.Malformed("dns question is cut")
	}
	query := Query{ID: u16(b), Name: name, Type: u16(b[at:]), Class: u16(b[at+2:])}
	end := at + 4
	rest := b[end:]
	if additionals == 1 {
		// Root name, type OPT, payload size, extended flags, length, options. The options are not forwarded anywhere,
		// so their content does not matter; their frame does.
		if len(rest) < 11 || rest[0] != 0 || u16(rest[1:]) != typeOPT || int(u16(rest[9:])) != len(rest)-11 {
			return Query{}, 0, wire.Malformed("dns additional record is not an OPT record")
		}
		rest = nil
	}
	if len(rest) != 0 {
		return Query{}, 0, wire.Malformed("%d bytes follow the dns question", len(rest))
	}
	return query, end, nil
}

func parseName(b []byte, at int) (string, int, error) {
	name := make([]byte, 0, 64)
	for {
		if at >= len(b) {
			return "", 0, wire.Malformed("dns name is cut")
		}
		length := int(b[at])
		at++
		if length == 0 {
			return string(name), at, nil
		}
		if length > labelBytesMax {
			return "", 0, wire.Malformed("dns label length %d; a question has no use for compression", length)
		}
		if at+length > len(b) {
			return "", 0, wire.Malformed("dns label is cut")
		}
		if len(name) > 0 {
			name = append(name, '.')
		}
		for _, c := range b[at : at+length] {
			switch {
			case c >= 'A' && c <= 'Z':
				c += 'a' - 'A'
			case c >= 'a' && c <= 'z', c >= '0' && c <= '9', c == '-', c == '_':
			default:
				return "", 0, wire.Malformed("dns label contains byte %#02x", c)
			}
			name = append(name, c)
		}
		at += length
		if len(name)+2 > nameBytesMax {
			return "", 0, wire.TooLarge("dns name is longer than %d bytes", nameBytesMax)
		}
	}
}

// Answer returns the response that gives addrs (IPv4 ones; others are left out) for query, or nil when query does not
// parse. At most 15 addresses are given, so that the response fits 512 bytes without TCP. A query for another type
// than A is answered as NoData does.
func Answer(query []byte, addrs []netip.Addr, ttl uint32) []byte {
	return respond(query, 0, addrs, ttl)
}

// NoData returns the response "the name exists, this type does not" (RFC 2308 section 2.2), or nil.
func NoData(query []byte) []byte { return respond(query, 0, nil, 0) }

// NXDomain returns the response "no such name", or nil.
func NXDomain(query []byte) []byte { return respond(query, rcodeNXDomain, nil, 0) }

func respond(query []byte, rcode byte, addrs []netip.Addr, ttl uint32) []byte {
	asked, end, err := parse(query)
	if err != nil {
		return nil
	}
	if asked.Type != TypeA || asked.Class != ClassIN {
		addrs = nil
	}
	out := make([]byte, 0, end+16*min(len(addrs), answersMax))
	out = append(out, query[:end]...)
	out[2] = 0x80 | query[2]&0x01 | 0x04  // QR, AA, and RD as asked
	out[3] = 0x80 | query[3]&0x10 | rcode // RA, and CD as asked
	out[10], out[11] = 0, 0               // no OPT: a server without EDNS (RFC 6891 section 6.1.1)
	count := 0
	for _, addr := range addrs {
		addr = addr.Unmap()
		if !addr.Is4() || count == answersMax {
			continue
		}
		v4 := addr.As4()
		out = append(out, 0xc0, headerBytes, 0, TypeA, 0, ClassIN, byte(ttl>>24), byte(ttl>>16), byte(ttl>>8), byte(ttl), 0, 4)
		out = append(out, v4[:]...)
		count++
	}
	out[6], out[7] = 0, byte(count)
	return out
}

func u16(b []byte) uint16 { return uint16(b[0])<<8 | uint16(b[1]) }
