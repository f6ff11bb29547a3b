package http2

import (
	"errors"
	"strings"

	"golang.org/x/net/http2/hpack"

	"kalium.dev/kalium/runtime/internal/wire"
	"kalium.dev/kalium/runtime/internal/wire/http1"
)

// Head is a request's head.
type Head struct {
	Method    string
	Scheme    string   // http or https
	Authority string   // lower case; a Host field, if any, says the same
	Path      string   // without query; no escapes, no dot segments, no empty segments
	Query     []string // the keys, in order; none appears twice
	Fields    []http1.Field

	ContentLength int64 // -1 when the head does not say and a body may follow
	GRPC          bool  // a gRPC call: content-type application/grpc, whatever its suffix
}

// reading is what is known of a head while its fields come.
type reading struct {
	err    error
	bytes  int // as HTTP/1.1 would spell the fields
	pseudo bool
	target string

	host, length, contentType, expect, trailers bool // a field was there
}

// request reads HEADERS and its CONTINUATIONs (RFC 9113 sections 6.2, 6.10 and 8.3.1).
func (c *Client) request(first header, b []byte) (int, Unit, error) {
	if err := c.checkStream(first.stream); err != nil {
		return 0, Unit{}, err
	}
	n, err := blockEnd(first, b)
	if err != nil {
		return 0, Unit{}, err
	}
	fragment, err := firstFragment(first, b[frameHeader:frameHeader+first.length])
	if err != nil {
		return 0, Unit{}, err
	}
	c.beginHead()
	err = c.decode(fragment)
	for at := frameHeader + first.length; at < n && err == nil; {
		end := at + frameHeader + (int(b[at])<<16 | int(b[at+1])<<8 | int(b[at+2]))
		err = c.decode(b[at+frameHeader : end])
		at = end
	}
	if err == nil {
		err = c.decoder.Close()
	}
	if err != nil {
		return 0, Unit{}, compression(err)
	}
	end := first.has(flagEndStream)
	if err := c.judge(end); err != nil {
		return 0, Unit{}, err
	}
	c.last = first.stream
	if !end {
		c.open[first.stream] = c.head.ContentLength
	}
	return n, Unit{Kind: Request, Stream: first.stream, Head: &c.head, End: end}, nil
}

func (c *Client) checkStream(stream uint32) error {
	if _, open := c.open[stream]; open {
		return wire.Unsupported("trailers")
	}
	if stream%2 == 0 || stream <= c.last {
		return wire.Malformed("HEADERS on stream %d behind stream %d", stream, c.last)
	}
	if len(c.open) == openMax {
		return wire.TooLarge("more than %d open streams", openMax)
	}
	return nil
}

// blockEnd finds the end of the frame that has END_HEADERS and bounds what comes before it. No other frame may come
// between.
func blockEnd(first header, b []byte) (int, error) {
	h, end, total := first, 0, 0
	for frames := 0; ; frames++ {
		if total += h.length; total > blockMax+paddingMax+6 {
			return 0, wire.TooLarge("a compressed head of more than %d bytes", blockMax)
		}
		if end += frameHeader + h.length; h.has(flagEndHeaders) {
			if end > len(b) {
				return 0, wire.ErrShort
			}
			return end, nil
		}
		if frames == continuationsMax {
			return 0, wire.TooLarge("more than %d CONTINUATIONs", continuationsMax)
		}
		if end+frameHeader > len(b) {
			return 0, wire.ErrShort
		}
		var err error
		if h, err = readHeader(b[end:]); err != nil {
			return 0, err
		}
		if h.kind != frameContinuation || h.stream != first.stream {
			return 0, wire.Malformed("a frame of type %#02x in the middle of a head", uint8(h.kind))
		}
		if h.length == 0 {
			return 0, wire.Malformed("an empty CONTINUATION")
		}
	}
}

// firstFragment cuts padding and priority off the payload of HEADERS.
func firstFragment(h header, payload []byte) ([]byte, error) {
	if h.has(flagPadded) {
		if len(payload) == 0 || len(payload) <= int(payload[0]) {
			return nil, wire.Malformed("more padding than frame")
		}
		end := len(payload) - int(payload[0])
		if err := zeros(payload[end:]); err != nil {
			return nil, err
		}
		payload = payload[1:end]
	}
	if h.has(flagPriority) {
		if len(payload) < 5 {
			return nil, wire.Malformed("HEADERS too short for a priority")
		}
		if err := checkPriority(h.stream, payload); err != nil {
			return nil, err
		}
		payload = payload[5:]
	}
	return payload, nil
}

func (c *Client) beginHead() {
	c.head = Head{Query: c.head.Query[:0], Fields: c.head.Fields[:0], ContentLength: anyLength}
	c.reading = reading{pseudo: true}
}

// decode gives a fragment to the decoder, which calls field.
func (c *Client) decode(fragment []byte) error {
	if _, err := c.decoder.Write(fragment); err != nil {
		return err
	}
	return c.reading.err
}

func compression(err error) error {
	var refused *wire.Error
	switch {
	case errors.As(err, &refused):
		return refused
	case err == hpack.ErrStringLength:
		return wire.TooLarge("a field of more than %d bytes", http1.HeadBytesMax)
	}
	return wire.Malformed("HPACK: %v", err)
}

// field takes one field from the decoder.
func (c *Client) field(f hpack.HeaderField) {
	r := &c.reading
	if r.err != nil {
		return
	}
	if r.bytes += len(f.Name) + len(f.Value) + len(": \r\n"); r.bytes > http1.HeadBytesMax {
		r.err = wire.TooLarge("a head of more than %d bytes", http1.HeadBytesMax)
		return
	}
	if strings.HasPrefix(f.Name, ":") {
		r.err = c.pseudoField(f.Name, f.Value)
		return
	}
	r.pseudo = false
	if r.err = checkField(f.Name, f.Value); r.err != nil {
		return
	}
	if len(c.head.Fields) == http1.FieldsMax {
		r.err = wire.TooLarge("more than %d fields", http1.FieldsMax)
		return
	}
	c.head.Fields = append(c.head.Fields, http1.Field{Name: f.Name, Value: f.Value})
	r.err = c.judgeField(f.Name, f.Value)
}

// pseudoField takes one of the four that a request has (RFC 9113 section 8.3.1), each once and before all others.
func (c *Client) pseudoField(name, value string) error {
	var into *string
	switch name {
	case ":method":
		into = &c.head.Method
	case ":scheme":
		into = &c.head.Scheme
	case ":authority":
		into = &c.head.Authority
	case ":path":
		into = &c.reading.target
	default:
		// RFC 8441 makes a tunnel with :protocol.
		return wire.Unsupported("a pseudo-field other than :method, :scheme, :authority and :path")
	}
	if !c.reading.pseudo {
		return wire.Malformed("%s behind the fields", name)
	}
	if *into != "" {
		return wire.Malformed("%s twice", name)
	}
	if value == "" {
		return wire.Malformed("an empty %s", name)
	}
	*into = value
	return nil
}

// checkField has http1's rules for names and values, and RFC 9113 section 8.2.1's: small letters, no white space around
// the value.
func checkField(name, value string) error {
	if name == "" {
		return wire.Malformed("a field without a name")
	}
	for i := range len(name) {
		if c := name[i]; !(c >= 'a' && c <= 'z' || c >= '0' && c <= '9' || c == '-') {
			return wire.Malformed("byte %#02x in a field name", c)
		}
	}
	for i := range len(value) {
		if c := value[i]; (c < 0x20 || c >= 0x7f) && c != '\t' {
			return wire.Malformed("byte %#02x in a field", c)
		}
	}
	if value != strings.Trim(value, " \t") {
		return wire.Malformed("white space around a field")
	}
	return nil
}

// judgeField reads the fields that a request's meaning depends on.
func (c *Client) judgeField(name, value string) error {
	r := &c.reading
	switch name {
	case "connection", "transfer-encoding", "upgrade", "keep-alive", "proxy-connection", "http2-settings":
		// Of one connection in HTTP/1.1 (RFC 9113 section 8.2.2); a proxy that writes HTTP/1.1 may believe them.
		return wire.Malformed("field %s in HTTP/2", name)
	case "trailer":
		return wire.Unsupported("trailers")
	case "te":
		if value != "trailers" {
			return wire.Malformed("te other than trailers")
		}
		r.trailers = true
	case "host":
		if r.host || !strings.EqualFold(value, c.head.Authority) {
			return wire.Malformed("a host that is not :authority")
		}
		r.host = true
	case "content-length":
		length, ok := http1.ParseLength(value)
		if r.length || !ok {
			return wire.Malformed("a content-length that is not one plain number")
		}
		c.head.ContentLength, r.length = length, true
	case "expect":
		if r.expect || !strings.EqualFold(value, "100-continue") {
			return wire.Malformed("an expect other than 100-continue")
		}
		r.expect = true
	case "content-type":
		if r.contentType {
			return wire.Malformed("content-type twice")
		}
		const grpc = "application/grpc"
		r.contentType = true
		c.head.GRPC = len(value) >= len(grpc) && strings.EqualFold(value[:len(grpc)], grpc)
	default:
		if http1.Misleads(name) {
			return wire.Unsupported("field %s", name)
		}
	}
	return nil
}

// judge looks at the whole head. end says that no body follows.
func (c *Client) judge(end bool) (err error) {
	h := &c.head
	if err := http1.CheckMethod(h.Method); err != nil {
		return err
	}
	if h.Scheme != "http" && h.Scheme != "https" {
		return wire.Malformed("a :scheme other than http and https")
	}
	if !http1.IsHost(h.Authority) {
		return wire.Malformed("an :authority that is no host")
	}
	h.Authority = strings.ToLower(h.Authority)
	if h.Path, h.Query, err = http1.SplitTarget(c.reading.target, h.Query); err != nil {
		return err
	}
	if end {
		if h.ContentLength > 0 {
			return wire.Malformed("a body of another length than its content-length")
		}
		h.ContentLength = 0
	}
	if h.ContentLength != 0 && http1.Bodiless(h.Method) {
		return wire.Unsupported("a %s request with a body", h.Method)
	}
	// gRPC servers differ in what they ask of a call; a call without these is one for some of them only.
	if h.GRPC && (h.Method != "POST" || !c.reading.trailers) {
		return wire.Malformed("a gRPC call without POST and te: trailers")
	}
	return nil
}
