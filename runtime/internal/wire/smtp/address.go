package smtp

import (
	"strings"

	"kalium.dev/kalium/runtime/internal/wire"
)

// Bounds of an address (RFC 5321 section 4.5.3.1).
const (
	localBytesMax  = 64
	domainBytesMax = 255
	addressMax     = 254 // erratum 1690 of RFC 3696: what fits into a path
	sizeDigitsMax  = 20
)

// localSpecials are the characters beside letters and digits that a part of a local part may have. Left out of "atext" (RFC
// 5322 section 3.2.3) are those that some servers route or run programs by: % ! | / `.
const localSpecials = "#$&'*+-=?^_{}~"

// path reads keyword and address, and returns the address with its domain in lower case, and what follows it.
func path(keyword, args string) (address, parameters string, err error) {
	if len(args) < len(keyword) || !strings.EqualFold(args[:len(keyword)], keyword) || !strings.HasPrefix(args[len(keyword):], "<") {
		return "", "", wire.Malformed("%s<ADDRESS> is expected", keyword)
	}
	address, parameters, closed := strings.Cut(args[len(keyword)+1:], ">")
	if !closed {
		return "", "", wire.Malformed("an address without an end")
	}
	if parameters != "" {
		if parameters[0] != ' ' || len(parameters) == 1 {
			return "", "", wire.Malformed("bytes behind an address")
		}
		parameters = parameters[1:]
	}
	local, domain, hasDomain := strings.Cut(address, "@")
	switch {
	case address == "":
		return "", "", wire.Unsupported("the empty address")
	case strings.HasPrefix(local, "\""):
		return "", "", wire.Unsupported("a quoted local part")
	case local == "" || strings.Contains(domain, ":") && !strings.HasPrefix(domain, "["):
		return "", "", wire.Unsupported("a source route")
	case !hasDomain:
		return "", "", wire.Unsupported("an address without a domain")
	case strings.HasPrefix(domain, "["):
		return "", "", wire.Unsupported("an address literal")
	case len(address) > addressMax || len(local) > localBytesMax:
		return "", "", wire.TooLarge("an address of %d bytes", len(address))
	}
	for _, atom := range strings.Split(local, ".") {
		if atom == "" {
			return "", "", wire.Malformed("an empty part of an address")
		}
		for i := range len(atom) {
			if !isAlphanumeric(atom[i]) && strings.IndexByte(localSpecials, atom[i]) < 0 {
				return "", "", wire.Unsupported("byte %#02x in an address", atom[i])
			}
		}
	}
	domain = strings.ToLower(domain)
	for _, label := range strings.Split(domain, ".") {
		if label == "" || len(label) > 63 || label[0] == '-' || label[len(label)-1] == '-' {
			return "", "", wire.Malformed("the domain of an address")
		}
		for i := range len(label) {
			if !isAlphanumeric(label[i]) && label[i] != '-' {
				return "", "", wire.Malformed("byte %#02x in the domain of an address", label[i])
			}
		}
	}
	return local + "@" + domain, parameters, nil
}

// mailParameters checks the parameters of MAIL: SIZE (RFC 1870) and BODY (RFC 6152).
func mailParameters(parameters string) error {
	if parameters == "" {
		return nil
	}
	seen := map[string]bool{}
	for _, parameter := range strings.Split(parameters, " ") {
		keyword, value, _ := strings.Cut(parameter, "=")
		keyword = strings.ToUpper(keyword)
		if seen[keyword] {
			return wire.Malformed("a parameter of MAIL again")
		}
		seen[keyword] = true
		switch keyword {
		case "SIZE":
			for i := range len(value) {
				if !isDigit(value[i]) {
					return wire.Malformed("parameter SIZE of MAIL")
				}
			}
			if value == "" || len(value) > sizeDigitsMax {
				return wire.Malformed("parameter SIZE of MAIL")
			}
		case "BODY":
			if value = strings.ToUpper(value); value != "7BIT" && value != "8BITMIME" {
				return wire.Unsupported("parameter BODY of MAIL other than 7BIT and 8BITMIME")
			}
		default:
			return wire.Unsupported("a parameter of MAIL other than SIZE and BODY")
		}
	}
	return nil
}

func isDigit(c byte) bool { return c >= '0' && c <= '9' }

func isLetter(c byte) bool { return c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' }

func isAlphanumeric(c byte) bool { return isDigit(c) || isLetter(c) }

// isBase64 tells whether s has only characters of base64 (RFC 4648 section 4), and some.
func isBase64(s string) bool {
	digits := strings.TrimRight(s, "=")
	for i := range len(digits) {
		if !isAlphanumeric(digits[i]) && digits[i] != '+' && digits[i] != '/' {
			return false
		}
	}
	return digits != "" && len(s)-len(digits) <= 2
}
