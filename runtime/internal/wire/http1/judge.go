package http1

import (
	"encoding/base64"
	"strings"

	"kalium.dev/kalium/runtime/internal/wire"
)

// single is a field that a request has at most once.
type single struct {
	value string
	count int
}

func (s *single) add(value string) { s.value, s.count = value, s.count+1 }

// is tells whether the field came once, with this value in any letters.
func (s *single) is(value string) bool { return s.count == 1 && strings.EqualFold(s.value, value) }

// meaning is what the fields say that a request's meaning depends on.
type meaning struct {
	host, length, encoding, expect single

	upgrade, key, version single
	upgrades              bool // Connection says so
}

// knownMax is the length of the longest name that means something here.
const knownMax = len("x-http-method-override")

// lower spells a name in small letters, in the memory of buffer. Names that are too long to mean anything are empty.
func lower(name string, buffer *[knownMax]byte) []byte {
	if len(name) > knownMax {
		return nil
	}
	for i := range len(name) {
		c := name[i]
		if c >= 'A' && c <= 'Z' {
			c += 'a' - 'A'
		}
		buffer[i] = c
	}
	return buffer[:len(name)]
}

// judgeFields reads the fields and refuses what some servers take for another request than the one that is judged.
func (h *RequestHead) judgeFields(incoming bool) error {
	var m meaning
	var buffer [knownMax]byte
	for i := range h.Fields {
		field := &h.Fields[i]
		switch name := lower(field.Name, &buffer); string(name) {
		case "host":
			m.host.add(field.Value)
		case "content-length":
			m.length.add(field.Value)
		case "transfer-encoding":
			m.encoding.add(field.Value)
		case "expect":
			m.expect.add(field.Value)
		case "connection", "proxy-connection":
			if err := h.connection(field.Value, &m); err != nil {
				return err
			}
		case "upgrade":
			m.upgrade.add(field.Value)
		case "sec-websocket-key":
			m.key.add(field.Value)
		case "sec-websocket-version":
			m.version.add(field.Value)
		case "http2-settings":
			return wire.Unsupported("field http2-settings")
		case "trailer":
			return wire.Unsupported("trailers")
		case "te":
			// Promises to understand trailers; harmless by itself, and httplib2 sends it.
		default:
			if !incoming && Misleads(string(name)) {
				return wire.Unsupported("field %s", strings.ToLower(field.Name))
			}
		}
	}
	if m.host.count != 1 || !IsHost(m.host.value) {
		return wire.Malformed("not exactly one Host")
	}
	h.Host = strings.ToLower(m.host.value)
	if err := h.framing(&m); err != nil {
		return err
	}
	if !incoming && (h.Chunked || h.ContentLength > 0) && Bodiless(h.Method) {
		return wire.Unsupported("a %s request with a body", h.Method)
	}
	if m.expect.count > 0 && !m.expect.is("100-continue") {
		return wire.Malformed("an Expect other than 100-continue")
	}
	h.Expect = m.expect.count == 1
	if m.upgrade.count == 0 && !m.upgrades {
		return nil
	}
	if incoming {
		return wire.Unsupported("a connection upgrade")
	}
	return h.websocket(&m)
}

// framing says where the body ends (RFC 9112 section 6).
func (h *RequestHead) framing(m *meaning) error {
	switch {
	case m.length.count+m.encoding.count > 1:
		return wire.Malformed("the body's length is stated more than once")
	case m.length.count == 1:
		var ok bool
		if h.ContentLength, ok = ParseLength(m.length.value); !ok {
			return wire.Malformed("a Content-Length that is not a plain number")
		}
	case m.encoding.count == 1:
		if m.encoding.value != "chunked" {
			return wire.Malformed("a Transfer-Encoding other than chunked")
		}
		h.Chunked = true
	}
	return nil
}

// connection reads the options. Names of other fields are refused: a proxy drops the fields that are named there
// (RFC 9110 section 7.6.1), so a function could have the guard's own token dropped on the way.
func (h *RequestHead) connection(value string, m *meaning) error {
	for more := true; more; {
		var option string
		option, value, more = strings.Cut(value, ",")
		switch option = trim(option); {
		case strings.EqualFold(option, "close"):
			h.Close = true
		case strings.EqualFold(option, "keep-alive"):
		case strings.EqualFold(option, "upgrade"):
			m.upgrades = true
		default:
			return wire.Unsupported("a connection option other than close, keep-alive and upgrade")
		}
	}
	return nil
}

// websocket accepts the one upgrade that there is, in the one form of RFC 6455 section 4.1. What nearly is an upgrade may
// be one for the server.
func (h *RequestHead) websocket(m *meaning) error {
	if !m.upgrade.is("websocket") || !m.upgrades || h.Close {
		return wire.Unsupported("a connection upgrade")
	}
	if h.Method != "GET" || !m.version.is("13") || m.key.count != 1 || !isKey(m.key.value) {
		return wire.Unsupported("a WebSocket upgrade other than RFC 6455 has it")
	}
	h.Upgrade = "websocket"
	return nil
}

// isKey tells 16 bytes in base64.
func isKey(key string) bool {
	var decoded [18]byte
	if len(key) != base64.StdEncoding.EncodedLen(16) {
		return false
	}
	n, err := base64.StdEncoding.Strict().Decode(decoded[:], []byte(key))
	return err == nil && n == 16
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
