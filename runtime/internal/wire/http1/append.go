package http1

import (
	"strconv"
	"strings"
)

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
	switch {
	case h.Upgrade != "":
		dst = appendField(dst, "Connection", "Upgrade")
	case h.Close:
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
