// Package http1 reads HTTP/1.1 requests and answers (RFC 9110, RFC 9112) in one narrow spelling.
//
// The request parser refuses every form that two servers are known to read differently: those are what request
// smuggling is made of. Common clients send none of them. The answer parser is more lenient, because what it reads
// was sent by a server and only decides where the answer ends.
package http1

import (
	"bytes"
	"strings"
	"unsafe"

	"kalium.dev/kalium/runtime/internal/wire"
)

// Bounds of a head.
const (
	HeadBytesMax  = 16 * 1024 // nginx, Apache and Python's http.server stop between 8 and 64 KiB
	FieldsMax     = 100       // the bound of Python's http.client
	methodMax     = 16
	targetMax     = 8 * 1024
	queryKeysMax  = 32
	lengthDigits  = 18 // fits int64 with room for the body that follows
	chunkLineMax  = 16 // a size of at most 15 hexadecimal digits and a line end
	reasonTextMax = 512
)

// Field is a header field as it was sent; only the whitespace around the value is gone.
type Field struct{ Name, Value string }

// RequestHead is a request's line and fields. It may be used for one request after the other, which costs no memory.
type RequestHead struct {
	Method string
	Target string   // as sent: path and query
	Path   string   // without query; no escapes, no dot segments, no empty segments
	Query  []string // the keys, in order; none appears twice
	Host   string   // the field's value, lower case
	Fields []Field  // in order, Host included

	ContentLength int64 // 0 when there is no body or it is chunked
	Chunked       bool
	Close         bool   // the client means to close after the answer
	Expect        bool   // 100-continue
	Upgrade       string // what the connection shall become (websocket), when the server agrees; empty: nothing

	text []byte // what the strings are parts of
	seen int    // bytes of an unfinished head that hold nothing to refuse
}

// ParseRequest reads the head of a request that a function sends, at the front of b; n counts its bytes, the empty line
// included. A body follows when Chunked is set or ContentLength is not 0. Whoever lets a request pass has to look at
// Upgrade.
func ParseRequest(b []byte) (head *RequestHead, n int, err error) {
	return parse(b, false)
}

// ParseIncoming reads the head of a request that comes to a function, as ParseRequest does. What the function makes of
// it inside is not judged. There are no upgrades.
func ParseIncoming(b []byte) (head *RequestHead, n int, err error) {
	return parse(b, true)
}

func parse(b []byte, incoming bool) (*RequestHead, int, error) {
	head := &RequestHead{}
	n, err := head.parse(b, incoming)
	if err != nil {
		return nil, 0, err
	}
	return head, n, nil
}

// Parse does what ParseRequest does, in h's own memory. Its strings, those in Query and Fields too, are parts of that
// memory: they hold until the next Parse and have to be copied (strings.Clone) by whoever keeps one for longer. b is not
// kept. After an error h is of no use but for another Parse; after wire.ErrShort that has to be of the same head, longer.
func (h *RequestHead) Parse(b []byte) (n int, err error) {
	return h.parse(b, false)
}

func (h *RequestHead) parse(b []byte, incoming bool) (int, error) {
	// Heads may come byte by byte: what was seen is not looked at again until the head is whole, and then all of it is.
	if h.seen = min(h.seen, len(b)); h.seen > 0 {
		if _, err := headEnd(b, h.seen-1); err == wire.ErrShort {
			return 0, h.short(b)
		}
	}
	n, err := headEnd(b, 0)
	if err == wire.ErrShort {
		return 0, h.short(b)
	}
	h.seen = 0
	if err != nil {
		return 0, err
	}
	text := append(h.text[:0], b[:n]...)
	*h = RequestHead{Query: h.Query[:0], Fields: h.Fields[:0], text: text}
	// The one place where strings over memory that changes are made; nothing writes to it before the next parse.
	line, rest := cutLine(unsafe.String(&text[0], n))
	if err := h.requestLine(line); err != nil {
		return 0, err
	}
	if h.Fields, err = parseFields(rest, className, h.Fields); err != nil {
		return 0, err
	}
	if err := h.judgeFields(incoming); err != nil {
		return 0, err
	}
	return n, nil
}

// headEnd finds the end of the empty line, and refuses at the first byte that no head may hold: CR and LF only
// together (RFC 9112 section 2.2 lets servers take a bare LF, and some do not), no other control characters. It begins at
// b[from:].
func headEnd(b []byte, from int) (int, error) {
	whole := b
	b = b[:min(len(b), HeadBytesMax)]
	for i := from; i < len(b); i++ {
		c := b[i]
		if classText.has(c) {
			continue
		}
		switch {
		case c == '\n':
			if i == 0 || b[i-1] != '\r' {
				return 0, wire.Malformed("a line feed without a carriage return")
			}
			if i >= 3 && b[i-2] == '\n' {
				return i + 1, nil
			}
		case c == '\r':
			if i == 0 {
				return 0, wire.Malformed("an empty line before the head")
			}
			if i+1 < len(b) && b[i+1] != '\n' {
				return 0, wire.Malformed("a carriage return without a line feed")
			}
		default:
			return 0, wire.Malformed("byte %#02x in a head", c)
		}
	}
	if len(whole) > HeadBytesMax {
		return 0, wire.TooLarge("a head of more than %d bytes", HeadBytesMax)
	}
	return 0, wire.ErrShort
}

// short says that b is an unfinished head, unless it cannot become a request: then it is refused at once instead of being
// held until a deadline.
func (h *RequestHead) short(b []byte) error {
	if bytes.IndexByte(b[:h.seen], '\n') < 0 {
		if err := earlyLine(b); err != nil {
			h.seen = 0
			return err
		}
	}
	h.seen = len(b)
	return wire.ErrShort
}

// earlyLine reads a request line that may be unfinished.
func earlyLine(b []byte) error {
	line, _, complete := bytes.Cut(b, []byte("\r\n"))
	if complete {
		return new(RequestHead).requestLine(string(line))
	}
	for i, c := range line {
		if c == ' ' && i > 0 {
			return nil
		}
		if !classToken.has(c) {
			return wire.Malformed("byte %#02x in a method", c)
		}
		if i == methodMax {
			return wire.Malformed("a method of more than %d bytes", methodMax)
		}
	}
	return nil
}

// cutLine cuts at the first line end. There is one, since the text is a whole head, in which CR and LF come together.
func cutLine(text string) (line, rest string) {
	end := strings.IndexByte(text, '\r')
	return text[:end], text[end+2:]
}

// requestLine reads method, target and version (RFC 9112 section 3), one space between them.
func (h *RequestHead) requestLine(line string) (err error) {
	if spaces := strings.Count(line, " "); spaces != 2 {
		return wire.Malformed("a request line of %d parts", spaces+1)
	}
	method, rest, _ := strings.Cut(line, " ")
	target, version, _ := strings.Cut(rest, " ")
	if err := CheckMethod(method); err != nil {
		return err
	}
	if version != "HTTP/1.1" {
		return wire.Unsupported("version %s", version)
	}
	h.Method, h.Target = method, target
	h.Path, h.Query, err = SplitTarget(target, h.Query)
	return err
}

// parseFields reads the lines up to and with the empty one (RFC 9112 section 5), which is there. names is the class of
// their names' bytes.
func parseFields(text string, names class, fields []Field) ([]Field, error) {
	for {
		line, rest := cutLine(text)
		if line == "" {
			return fields, nil
		}
		text = rest
		if len(fields) == FieldsMax {
			return nil, wire.TooLarge("more than %d fields", FieldsMax)
		}
		name, value, found := strings.Cut(line, ":")
		if !found || name == "" {
			return nil, wire.Malformed("a field line without a name")
		}
		for i := range len(name) {
			// Covers obs-fold (a line that begins with whitespace) and whitespace before the colon.
			if !names.has(name[i]) {
				return nil, wire.Malformed("byte %#02x in a field name", name[i])
			}
		}
		fields = append(fields, Field{Name: name, Value: trim(value)})
	}
}

// trim takes the white space off that RFC 9110 section 5.5 does not count to a value.
func trim(value string) string {
	for len(value) > 0 && (value[0] == ' ' || value[0] == '\t') {
		value = value[1:]
	}
	for len(value) > 0 && (value[len(value)-1] == ' ' || value[len(value)-1] == '\t') {
		value = value[:len(value)-1]
	}
	return value
}
