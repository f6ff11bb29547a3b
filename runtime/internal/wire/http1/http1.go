// Package http1 reads HTTP/1.1 requests and answers (RFC 9110, RFC 9112) in one narrow spelling.
//
// The request parser refuses every form that two servers are known to read differently: those are what request
// smuggling is made of. Common clients send none of them. The answer parser is more lenient, because what it reads
// was sent by a server and only decides where the answer ends.
package http1

import (
	"bytes"
	"strconv"
	"strings"

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

// RequestHead is a request's line and fields.
type RequestHead struct {
	Method string
	Target string   // as sent: path and query
	Path   string   // without query; no escapes, no dot segments, no empty segments
	Query  []string // the keys, in order; none appears twice
	Host   string   // the field's value, lower case
	Fields []Field  // in order, Host included

	ContentLength int64 // 0 when there is no body or it is chunked
	Chunked       bool
	Close         bool // the client means to close after the answer
	Expect        bool // 100-continue
}

// ParseRequest reads the head of a request that a function sends, at the front of b; n counts its bytes, the empty line
// included. A body follows when Chunked is set or ContentLength is not 0.
func ParseRequest(b []byte) (head *RequestHead, n int, err error) {
	head, n, err = ParseIncoming(b)
	if err == nil {
		err = head.misleading()
	}
	if err != nil {
		return nil, 0, err
	}
	return head, n, nil
}

// misleading refuses what some servers take for another request than the one that was judged.
func (h *RequestHead) misleading() error {
	for i := range h.Fields {
		if name := strings.ToLower(h.Fields[i].Name); Misleads(name) {
			return wire.Unsupported("field %s", name)
		}
	}
	if (h.Chunked || h.ContentLength > 0) && Bodiless(h.Method) {
		return wire.Unsupported("a %s request with a body", h.Method)
	}
	return nil
}

// Misleads tells whether a field, by its lower-case name, puts another request in the place of the judged one: frameworks
// take method or target from it.
func Misleads(name string) bool {
	switch name {
	case "x-http-method-override", "x-http-method", "x-method-override", "x-original-url", "x-rewrite-url":
		return true
	}
	return false
}

// Bodiless tells the methods whose body RFC 9110 sections 9.3.1, 9.3.2 and 9.3.5 give no meaning. A server that does not
// read it takes it for the next request, which nobody has judged; Python's http.server is one.
func Bodiless(method string) bool { return method == "GET" || method == "HEAD" || method == "DELETE" }

// ParseIncoming reads the head of a request that comes to a function, as ParseRequest does. What the function makes of
// it inside is not judged.
func ParseIncoming(b []byte) (head *RequestHead, n int, err error) {
	n, err = headEnd(b)
	if err != nil {
		if err != wire.ErrShort {
			return nil, 0, err
		}
		return nil, 0, refuseEarly(b)
	}
	line, rest := cutLine(b[:n])
	head = &RequestHead{}
	if err := head.requestLine(line); err != nil {
		return nil, 0, err
	}
	if head.Fields, err = parseFields(rest, isNameByte); err != nil {
		return nil, 0, err
	}
	if err := head.judgeFields(); err != nil {
		return nil, 0, err
	}
	return head, n, nil
}

// headEnd finds the end of the empty line, and refuses at the first byte that no head may hold: CR and LF only
// together (RFC 9112 section 2.2 lets servers take a bare LF, and some do not), no other control characters.
func headEnd(b []byte) (int, error) {
	for i := 0; i < len(b); i++ {
		if i == HeadBytesMax {
			return 0, wire.TooLarge("a head of more than %d bytes", HeadBytesMax)
		}
		switch c := b[i]; {
		case c >= 0x20 && c < 0x7f, c == '\t':
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
	return 0, wire.ErrShort
}

// refuseEarly looks at an unfinished head: bytes that cannot become a request are refused at once instead of being
// held until a deadline.
func refuseEarly(b []byte) error {
	line, _, complete := bytes.Cut(b, []byte("\r\n"))
	if complete {
		return new(RequestHead).requestLineOr(line)
	}
	for i, c := range line {
		if c == ' ' && i > 0 {
			return wire.ErrShort
		}
		if !isToken(c) {
			return wire.Malformed("byte %#02x in a method", c)
		}
		if i == methodMax {
			return wire.Malformed("a method of more than %d bytes", methodMax)
		}
	}
	return wire.ErrShort
}

func (h *RequestHead) requestLineOr(line []byte) error {
	if err := h.requestLine(line); err != nil {
		return err
	}
	return wire.ErrShort
}

func cutLine(b []byte) (line, rest []byte) {
	end := bytes.Index(b, []byte("\r\n"))
	return b[:end], b[end+2:]
}

// requestLine reads method, target and version (RFC 9112 section 3), one space between them.
func (h *RequestHead) requestLine(line []byte) (err error) {
	parts := strings.Split(string(line), " ")
	if len(parts) != 3 {
		return wire.Malformed("a request line of %d parts", len(parts))
	}
	method, target, version := parts[0], parts[1], parts[2]
	if version != "HTTP/1.1" {
		return wire.Unsupported("version %s", version)
	}
	if err = CheckMethod(method); err != nil {
		return err
	}
	h.Method, h.Target = method, target
	h.Path, h.Query, err = SplitTarget(target, h.Query)
	return err
}

// CheckMethod refuses what is no method in capitals, and two that are: CONNECT makes a tunnel, TRACE echoes fields that
// only the guard may see.
func CheckMethod(method string) error {
	if method == "" || len(method) > methodMax {
		return wire.Malformed("a method of %d bytes", len(method))
	}
	for i := range len(method) {
		if method[i] < 'A' || method[i] > 'Z' {
			return wire.Malformed("byte %#02x in a method", method[i])
		}
	}
	if method == "CONNECT" || method == "TRACE" {
		return wire.Unsupported("method %s", method)
	}
	return nil
}

// SplitTarget accepts the origin form only (RFC 9112 section 3.2.1): with the absolute form some servers take the host
// from it and some from Host. Escapes are refused because servers differ in what they decode before routing. The keys of
// the query are appended to keys.
func SplitTarget(target string, keys []string) (path string, query []string, err error) {
	if len(target) > targetMax {
		return "", nil, wire.TooLarge("a target of %d bytes", len(target))
	}
	if !strings.HasPrefix(target, "/") {
		return "", nil, wire.Unsupported("a target that is not a path")
	}
	path, text, hasQuery := strings.Cut(target, "?")
	for i := range len(path) {
		if !isPathByte(path[i]) {
			return "", nil, wire.Malformed("byte %#02x in a path", path[i])
		}
	}
	segments := path[1:]
	for more := true; more; {
		var segment string
		segment, segments, more = strings.Cut(segments, "/")
		if segment == "" && more || segment == "." || segment == ".." {
			return "", nil, wire.Malformed("an empty or dot segment in a path")
		}
	}
	if hasQuery {
		keys, err = queryKeys(text, keys)
	}
	return path, keys, err
}

// queryKeys reads key=value pairs joined by '&'. A key has no escapes; a value may have any, since the policy does not
// look into values. A key twice is refused: servers take the first, the last or both.
func queryKeys(query string, keys []string) ([]string, error) {
	for i := 0; i < len(query); i++ {
		c := query[i]
		if c == '%' {
			if i+2 >= len(query) || !isHex(query[i+1]) || !isHex(query[i+2]) {
				return nil, wire.Malformed("a broken escape in a query")
			}
			continue
		}
		if !isPathByte(c) && c != '?' && c != '+' {
			return nil, wire.Malformed("byte %#02x in a query", c)
		}
	}
	for more := true; more; {
		var pair string
		pair, query, more = strings.Cut(query, "&")
		key, _, _ := strings.Cut(pair, "=")
		// ';' separates pairs for some servers.
		if key == "" || strings.ContainsAny(key, "%+;?") || strings.Contains(pair, ";") {
			return nil, wire.Malformed("a query key that is empty or escaped")
		}
		for _, known := range keys {
			if known == key {
				return nil, wire.Malformed("a query key appears twice")
			}
		}
		if len(keys) == queryKeysMax {
			return nil, wire.TooLarge("more than %d query keys", queryKeysMax)
		}
		keys = append(keys, key)
	}
	return keys, nil
}

// parseFields reads the lines up to and with the empty one (RFC 9112 section 5). allowed tells the bytes of a name.
func parseFields(b []byte, allowed func(byte) bool) ([]Field, error) {
	fields := make([]Field, 0, 12)
	for {
		line, rest := cutLine(b)
		if len(line) == 0 {
			return fields, nil
		}
		b = rest
		if len(fields) == FieldsMax {
			return nil, wire.TooLarge("more than %d fields", FieldsMax)
		}
		colon := bytes.IndexByte(line, ':')
		if colon <= 0 {
			return nil, wire.Malformed("a field line without a name")
		}
		for _, c := range line[:colon] {
			// Covers obs-fold (a line that begins with whitespace) and whitespace before the colon.
			if !allowed(c) {
				return nil, wire.Malformed("byte %#02x in a field name", c)
			}
		}
		value := bytes.Trim(line[colon+1:], " \t")
		fields = append(fields, Field{Name: string(line[:colon]), Value: string(value)})
	}
}

func (h *RequestHead) judgeFields() error {
	var host, length, encoding, expect string
	hosts, lengths, encodings, expects := 0, 0, 0, 0
	for i := range h.Fields {
		field := &h.Fields[i]
		switch strings.ToLower(field.Name) {
		case "host":
			host, hosts = field.Value, hosts+1
		case "content-length":
			length, lengths = field.Value, lengths+1
		case "transfer-encoding":
			encoding, encodings = field.Value, encodings+1
		case "expect":
			expect, expects = field.Value, expects+1
		case "connection", "proxy-connection":
			if err := h.connection(field.Value); err != nil {
				return err
			}
		case "upgrade", "http2-settings":
			return wire.Unsupported("field %s", strings.ToLower(field.Name))
		case "trailer":
			return wire.Unsupported("trailers")
		case "te":
			// Promises to understand trailers; harmless by itself, and httplib2 sends it.
		}
	}
	if hosts != 1 || !IsHost(host) {
		return wire.Malformed("not exactly one Host")
	}
	h.Host = strings.ToLower(host)
	switch {
	case lengths > 1 || encodings > 1 || lengths+encodings > 1:
		return wire.Malformed("the body's length is stated more than once")
	case lengths == 1:
		var ok bool
		if h.ContentLength, ok = ParseLength(length); !ok {
			return wire.Malformed("a Content-Length that is not a plain number")
		}
	case encodings == 1:
		if encoding != "chunked" {
			return wire.Malformed("a Transfer-Encoding other than chunked")
		}
		h.Chunked = true
	}
	if expects > 1 || expects == 1 && !strings.EqualFold(expect, "100-continue") {
		return wire.Malformed("an Expect other than 100-continue")
	}
	h.Expect = expects == 1
	return nil
}

// connection reads the options. Names of other fields are refused: a proxy drops the fields that are named there
// (RFC 9110 section 7.6.1), so a function could have the guard's own token dropped on the way.
func (h *RequestHead) connection(value string) error {
	for _, option := range strings.Split(value, ",") {
		switch strings.ToLower(strings.Trim(option, " \t")) {
		case "close":
			h.Close = true
		case "keep-alive":
		case "upgrade":
			return wire.Unsupported("a connection upgrade")
		default:
			return wire.Unsupported("a connection option other than close and keep-alive")
		}
	}
	return nil
}

// ParseLength reads 1*DIGIT (RFC 9110 section 8.6); no sign, no list, no underscore.
func ParseLength(text string) (int64, bool) {
	if text == "" || len(text) > lengthDigits {
		return 0, false
	}
	for i := range len(text) {
		if text[i] < '0' || text[i] > '9' {
			return 0, false
		}
	}
	n, err := strconv.ParseInt(text, 10, 64)
	return n, err == nil
}

// IsHost accepts a name or an IPv4 address with an optional port, or an IPv6 address in brackets.
func IsHost(host string) bool {
	if host == "" || len(host) > 260 {
		return false
	}
	name, port, hasPort := strings.Cut(host, ":")
	if strings.HasPrefix(host, "[") {
		end := strings.IndexByte(host, ']')
		if end < 3 {
			return false
		}
		for i := 1; i < end; i++ {
			if !isHex(host[i]) && host[i] != ':' && host[i] != '.' {
				return false
			}
		}
		rest := host[end+1:]
		if rest == "" {
			return true
		}
		name, port, hasPort = "v6", rest[1:], true
		if rest[0] != ':' {
			return false
		}
	}
	if hasPort {
		n, ok := ParseLength(port)
		if !ok || n < 1 || n > 65535 || port[0] == '0' {
			return false
		}
	}
	if name == "" || name[0] == '.' {
		return false
	}
	for i := range len(name) {
		c := name[i]
		if !(c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '-' || c == '.' || c == '_') {
			return false
		}
	}
	return true
}

// Append writes the head in our own spelling: the request line, the fields that drop does not name in their order,
// add, and the empty line. drop is asked with lower-case names and may be nil. Hop-by-hop fields and the framing
// fields are written by ourselves from what was judged, so drop cannot tear the head from its body.
func (h *RequestHead) Append(dst []byte, drop func(lowerName string) bool, add ...Field) []byte {
	dst = append(dst, h.Method...)
	dst = append(dst, ' ')
	dst = append(dst, h.Target...)
	dst = append(dst, " HTTP/1.1\r\n"...)
	hasLength := false
	for i := range h.Fields {
		field := &h.Fields[i]
		lower := strings.ToLower(field.Name)
		switch lower {
		case "content-length":
			hasLength = true
			continue
		case "transfer-encoding", "connection", "proxy-connection", "keep-alive", "te":
			continue
		case "host":
		default:
			if drop != nil && drop(lower) {
				continue
			}
		}
		dst = appendField(dst, field.Name, field.Value)
	}
	switch {
	case h.Chunked:
		dst = appendField(dst, "Transfer-Encoding", "chunked")
	case hasLength || h.ContentLength > 0:
		dst = append(dst, "Content-Length: "...)
		dst = strconv.AppendInt(dst, h.ContentLength, 10)
		dst = append(dst, "\r\n"...)
	}
	if h.Close {
		dst = appendField(dst, "Connection", "close")
	}
	for _, field := range add {
		dst = appendField(dst, field.Name, field.Value)
	}
	return append(dst, "\r\n"...)
}

func appendField(dst []byte, name, value string) []byte {
	dst = append(dst, name...)
	dst = append(dst, ": "...)
	dst = append(dst, value...)
	return append(dst, "\r\n"...)
}

// isToken tells tchar of RFC 9110 section 5.6.2.
func isToken(c byte) bool {
	return c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || strings.IndexByte("!#$%&'*+-.^_`|~", c) >= 0
}

// isNameByte tells the bytes of a request's field names: a part of tchar. Servers that pass fields on as variables (CGI,
// WSGI) write '-', '_' and others all as '_', so that X_Kalium_Token would be X-Kalium-Token.
func isNameByte(c byte) bool {
	return c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '-'
}

// isPathByte tells the characters of RFC 3986 section 3.3 without escapes. ';' begins parameters that some servers
// cut off before routing, so it is left out.
func isPathByte(c byte) bool {
	return c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || strings.IndexByte("/-._~!$&'()*+,=:@", c) >= 0
}

func isHex(c byte) bool {
	return c >= '0' && c <= '9' || c >= 'a' && c <= 'f' || c >= 'A' && c <= 'F'
}
