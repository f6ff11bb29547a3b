package http1

// class is a set of bytes; classes says to which of them a byte belongs.
type class uint8

const (
	classText  class = 1 << iota // of a request's head, besides line ends: printable ASCII and tab
	classToken                   // tchar of RFC 9110 section 5.6.2
	// className is a part of classToken, of the names in a request. Servers that pass fields on as variables (CGI, WSGI)
	// write '-', '_' and others all as '_', so that X_Kalium_Token would be X-Kalium-Token.
	className
	// classPath is RFC 3986 section 3.3 without escapes. ';' begins parameters that some servers cut off before routing, so
	// it is left out.
	classPath
	classHex
)

func (c class) has(b byte) bool { return classes[b]&c != 0 }

var classes = func() (table [256]class) {
	add := func(c class, bytes string) {
		for i := range len(bytes) {
			table[bytes[i]] |= c
		}
	}
	for c := range byte(0x7f) {
		switch {
		case c >= '0' && c <= '9', c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z':
			table[c] = classText | classToken | className | classPath
		case c >= 0x20:
			table[c] = classText
		}
	}
	add(classText, "\t")
	add(classToken, "!#$%&'*+-.^_`|~")
	add(className, "-")
	add(classPath, "/-._~!$&'()*+,=:@")
	add(classHex, "0123456789abcdefABCDEF")
	return table
}()
