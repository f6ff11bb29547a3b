// Package http2 reads what a client sends on an HTTP/2 connection (RFC 9113, HPACK RFC 7541) in one narrow spelling.
//
// Every stream's head is read, whatever the others do, by the rules that package http1 has for requests. What can carry
// bytes that no policy speaks about is refused: frames, flags and settings that the RFC does not define, trailers,
// padding other than zeros, debug data other than text. Bytes pass as they are; nothing is rewritten.
package http2

import (
	"encoding/binary"

	"golang.org/x/net/http2/hpack"

	"kalium.dev/kalium/runtime/internal/wire"
	"kalium.dev/kalium/runtime/internal/wire/http1"
)

// Preface is what a client's bytes begin with (RFC 9113 section 3.4). A SETTINGS frame follows.
const Preface = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

// Bounds of a connection. A unit that waits for more bytes is never longer than UnitBytesMax.
const (
	UnitBytesMax     = blockMax + paddingMax + (1+continuationsMax)*frameHeader + 6
	blockMax         = http1.HeadBytesMax // of the compressed head, in all its frames
	continuationsMax = 8                  // clients cut at 16 KiB, so they need one
	openMax          = 128                // streams whose request has not ended
	// tableMax bounds what a client may make of the dynamic table. The server's own bound is in its SETTINGS, which are not
	// seen here. An entry has the same index in a table of any size or none at all, so a server with another bound finds the
	// same fields or an error.
	tableMax     = 16 * 1024
	tableDefault = 4096 // RFC 9113 section 6.5.2
	paddingMax   = 255
	frameHeader  = 9
)

// UnitKind tells units apart. The zero kind is none.
type UnitKind uint8

// The kinds of a unit.
const (
	Support UnitKind = iota + 1 // upkeep of the connection; Text names it
	Request                     // a head: HEADERS with its CONTINUATIONs
	Data                        // a piece of a request's body
	Reset                       // the client gives a stream up
)

// Unit is what the bytes that Next returned are.
type Unit struct {
	Kind   UnitKind
	Stream uint32 // of Request, Data and Reset
	Head   *Head  // of Request; valid until the next call of Next
	End    bool   // of Request and Data: nothing follows on the stream
	Text   string // of Support
	Bytes  int    // of Data: how many bytes of content are among them
}

// Client reads one connection. Its memory is below 64 KiB: the dynamic table, one head, and a number for each open stream.
type Client struct {
	stage   stage
	err     error // what Next returned; final
	decoder *hpack.Decoder
	head    Head
	reading reading          // of the head that is being decoded
	last    uint32           // the highest stream that the client opened
	open    map[uint32]int64 // bytes of content that a stream has to bring yet, or anyLength
	data    dataFrame        // that is not whole
	control [controls]int    // frames that a connection needs few of
}

type stage uint8

const (
	inPreface stage = iota
	inFirst         // the SETTINGS behind the preface
	inFrames
	inData
)

const anyLength = -1

type dataFrame struct {
	stream  uint32
	content int // bytes that have not come
	padding int
	end     bool
}

// NewClient reads a connection from its first byte.
func NewClient() *Client {
	c := &Client{open: map[uint32]int64{}}
	c.decoder = hpack.NewDecoder(tableDefault, c.field)
	c.decoder.SetAllowedMaxDynamicTableSize(tableMax)
	c.decoder.SetMaxStringLength(http1.HeadBytesMax)
	return c
}

// Next reads the unit at the front of b; n counts its bytes. A body comes in as many units as the caller has pieces. An
// error other than wire.ErrShort is final for the connection.
func (c *Client) Next(b []byte) (n int, u Unit, err error) {
	if c.err != nil {
		return 0, Unit{}, c.err
	}
	switch c.stage {
	case inPreface:
		n, u, err = c.preface(b)
	case inData:
		n, u, err = c.content(b, 0)
	default:
		n, u, err = c.frame(b)
	}
	if err != nil {
		if err != wire.ErrShort {
			c.err = err
		}
		return 0, Unit{}, err
	}
	return n, u, nil
}

func (c *Client) preface(b []byte) (int, Unit, error) {
	for i := range min(len(b), len(Preface)) {
		if b[i] != Preface[i] {
			return 0, Unit{}, wire.Malformed("byte %#02x in an HTTP/2 preface", b[i])
		}
	}
	if len(b) < len(Preface) {
		return 0, Unit{}, wire.ErrShort
	}
	c.stage = inFirst
	return len(Preface), Unit{Kind: Support, Text: "preface"}, nil
}

type frameType uint8

// The frame types of RFC 9113 section 6.
const (
	frameData frameType = iota
	frameHeaders
	framePriority
	frameReset
	frameSettings
	framePushPromise
	framePing
	frameGoAway
	frameWindowUpdate
	frameContinuation
)

// Flags of RFC 9113 section 6. END_STREAM and ACK have one bit.
const (
	flagEndStream  = 0x01
	flagAck        = 0x01
	flagEndHeaders = 0x04
	flagPadded     = 0x08
	flagPriority   = 0x20
)

type header struct {
	length int
	kind   frameType
	flags  byte
	stream uint32
}

func (h header) has(flag byte) bool { return h.flags&flag != 0 }

// readHeader reads a frame's header (RFC 9113 section 4.1). Bits without a meaning have to be zero.
func readHeader(b []byte) (header, error) {
	h := header{
		length: int(b[0])<<16 | int(b[1])<<8 | int(b[2]),
		kind:   frameType(b[3]),
		flags:  b[4],
		stream: binary.BigEndian.Uint32(b[5:]),
	}
	if h.stream >= 1<<31 {
		return header{}, wire.Malformed("a reserved bit in a frame's stream")
	}
	if h.kind > frameContinuation {
		return header{}, wire.Unsupported("a frame of type %#02x", b[3])
	}
	if undefined := h.flags &^ flagsOf[h.kind]; undefined != 0 {
		return header{}, wire.Malformed("flag %#02x in a frame of type %#02x", undefined, b[3])
	}
	return h, nil
}

var flagsOf = [...]byte{
	frameData:         flagEndStream | flagPadded,
	frameHeaders:      flagEndStream | flagEndHeaders | flagPadded | flagPriority,
	frameSettings:     flagAck,
	framePushPromise:  flagEndHeaders | flagPadded,
	framePing:         flagAck,
	frameContinuation: flagEndHeaders,
}

func (c *Client) frame(b []byte) (int, Unit, error) {
	if len(b) < frameHeader {
		return 0, Unit{}, wire.ErrShort
	}
	h, err := readHeader(b)
	if err != nil {
		return 0, Unit{}, err
	}
	if c.stage == inFirst && (h.kind != frameSettings || h.has(flagAck)) {
		return 0, Unit{}, wire.Malformed("a preface without SETTINGS")
	}
	switch h.kind {
	case frameData:
		return c.beginData(h, b)
	case frameHeaders:
		return c.request(h, b)
	case framePushPromise:
		return 0, Unit{}, wire.Malformed("a PUSH_PROMISE from a client")
	case frameContinuation:
		return 0, Unit{}, wire.Malformed("a CONTINUATION that continues nothing")
	}
	return c.support(h, b)
}

// beginData reads the header of a DATA frame (RFC 9113 section 6.1) and what has come of its content.
func (c *Client) beginData(h header, b []byte) (int, Unit, error) {
	left, open := c.open[h.stream]
	if !open {
		return 0, Unit{}, wire.Malformed("DATA on a stream that is not open")
	}
	at := frameHeader
	d := dataFrame{stream: h.stream, content: h.length, end: h.has(flagEndStream)}
	if h.has(flagPadded) {
		if h.length == 0 {
			return 0, Unit{}, wire.Malformed("padding in an empty frame")
		}
		if len(b) == at {
			return 0, Unit{}, wire.ErrShort
		}
		d.padding = int(b[at])
		at++
		if d.content -= 1 + d.padding; d.content < 0 {
			return 0, Unit{}, wire.Malformed("more padding than frame")
		}
	}
	if left != anyLength {
		if left -= int64(d.content); left < 0 || d.end && left > 0 {
			return 0, Unit{}, wire.Malformed("a body of another length than its content-length")
		}
		c.open[h.stream] = left
	}
	if d.content == 0 && !d.end {
		if err := c.count(controlEmpty); err != nil {
			return 0, Unit{}, err
		}
	}
	c.data = d
	return c.content(b, at)
}

// content passes what is at b[at:] of the current DATA frame.
func (c *Client) content(b []byte, at int) (int, Unit, error) {
	if len(b) == 0 {
		return 0, Unit{}, wire.ErrShort
	}
	d := &c.data
	u := Unit{Kind: Data, Stream: d.stream, Bytes: min(len(b)-at, d.content)}
	at += u.Bytes
	d.content -= u.Bytes
	padding := min(len(b)-at, d.padding)
	if err := zeros(b[at : at+padding]); err != nil {
		return 0, Unit{}, err
	}
	at += padding
	d.padding -= padding
	if d.content+d.padding > 0 {
		c.stage = inData
		return at, u, nil
	}
	c.stage = inFrames
	if u.End = d.end; u.End {
		delete(c.open, d.stream)
	}
	return at, u, nil
}

// zeros refuses padding that carries something; RFC 9113 section 6.1 allows that.
func zeros(padding []byte) error {
	for _, c := range padding {
		if c != 0 {
			return wire.Malformed("padding other than zeros")
		}
	}
	return nil
}
