package http1

import (
	"strconv"
	"strings"

	"kalium.dev/kalium/runtime/internal/wire"
)

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
		if !classPath.has(path[i]) {
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
			if i+2 >= len(query) || !classHex.has(query[i+1]) || !classHex.has(query[i+2]) {
				return nil, wire.Malformed("a broken escape in a query")
			}
			continue
		}
		if !classPath.has(c) && c != '?' && c != '+' {
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
			if !classHex.has(host[i]) && host[i] != ':' && host[i] != '.' {
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
