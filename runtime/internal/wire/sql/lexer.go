package sql

import (
	"strings"

	"kalium.dev/kalium/runtime/internal/wire"
)

type kind uint8

const (
	end    kind = iota
	word        // bare identifier or keyword
	quoted      // identifier in backticks
	text        // string literal, also with an introducer or as hexadecimal or bit literal
	number
	parameter // of a prepared statement: a value
	symbol    // operator or punctuation
)

// token is a piece of the statement. value is in upper case for words, unquoted for names, and empty for literals,
// whose content must not reach a verdict.
type token struct {
	kind    kind
	value   string
	name    string // word and quoted: as written, without backticks
	raw     []byte // text in plain quotes and number: as written; only the closed SET list looks at it
	touches bool   // no space or comment stands before it
}

func (t token) is(kind kind, value string) bool { return t.kind == kind && t.value == value }

// lexer cuts a statement into tokens as MySQL 5.6 to 8.4 and MariaDB 10 and 11 do with the default sql_mode: backslash
// escapes are on, double quotes hold strings. Where versions or character sets differ, it refuses. Outside literals
// and comments only printable ASCII is taken, since what counts as a space beyond it depends on the character set.
type lexer struct {
	rest       []byte
	prev       byte // the byte before rest, 0 at the beginning
	parameters bool // question marks are read
}

// introducers name the character set of a literal. In these, as in all that a connection may use, no byte of a longer
// character is a quote or a backslash.
var introducers = map[string]bool{"_UTF8MB4": true, "_UTF8": true, "_UTF8MB3": true, "_LATIN1": true, "_BINARY": true, "_ASCII": true}

// operators, longest first.
var operators = []string{"->>", "<=>", "<<", ">>", "<=", ">=", "<>", "!=", "&&", "||", "->"}

func (l *lexer) advance(n int) []byte {
	taken := l.rest[:n]
	if n > 0 {
		l.prev = taken[n-1]
	}
	l.rest = l.rest[n:]
	return taken
}

func (l *lexer) next() (token, error) {
	spaced, err := l.skip()
	if err != nil {
		return token{}, err
	}
	t, err := l.bare()
	t.touches = !spaced
	return t, err
}

// skip passes spaces and comments.
func (l *lexer) skip() (spaced bool, err error) {
	for len(l.rest) > 0 {
		switch c := l.rest[0]; {
		case c == ' ' || c == '\t' || c == '\n' || c == '\r':
			l.advance(1)
		case c == '#':
			if err := l.lineComment(); err != nil {
				return spaced, err
			}
		case c == '-' && len(l.rest) > 1 && l.rest[1] == '-':
			// Two dashes begin a comment only before a space; elsewhere they are two signs, and versions differ at the end.
			if len(l.rest) < 3 || !strings.ContainsRune(" \t\n\r", rune(l.rest[2])) {
				return spaced, wire.Malformed("two dashes that are not a comment")
			}
			if err := l.lineComment(); err != nil {
				return spaced, err
			}
		case c == '/' && len(l.rest) > 1 && l.rest[1] == '*':
			if err := l.blockComment(); err != nil {
				return spaced, err
			}
		default:
			return spaced, nil
		}
		spaced = true
	}
	return spaced, nil
}

func (l *lexer) lineComment() error {
	for i, c := range l.rest {
		if c == '\n' {
			l.advance(i + 1)
			return nil
		}
		if c == 0 {
			// MySQL ends the comment here and reads on.
			return wire.Malformed("a zero byte in a comment")
		}
	}
	l.advance(len(l.rest))
	return nil
}

func (l *lexer) blockComment() error {
	if len(l.rest) > 2 {
		switch l.rest[2] {
		case '!', 'M', 'm':
			// Executable for some versions and a comment for others.
			if l.rest[2] == '!' || len(l.rest) > 3 && l.rest[3] == '!' {
				return wire.Unsupported("an executable comment")
			}
		case '+':
			return wire.Unsupported("an optimizer hint")
		}
	}
	for i := 2; i < len(l.rest); i++ {
		switch {
		case l.rest[i] == 0:
			return wire.Malformed("a zero byte in a comment")
		case l.rest[i] == '/' && i+1 < len(l.rest) && l.rest[i+1] == '*':
			return wire.Malformed("a comment in a comment")
		case l.rest[i] == '*' && i+1 < len(l.rest) && l.rest[i+1] == '/':
			l.advance(i + 2)
			return nil
		}
	}
	return wire.Malformed("a comment without an end")
}

func (l *lexer) bare() (token, error) {
	if len(l.rest) == 0 {
		return token{kind: end}, nil
	}
	c := l.rest[0]
	switch {
	case isWordStart(c):
		return l.word()
	case isDigit(c), c == '.' && len(l.rest) > 1 && isDigit(l.rest[1]):
		return l.number()
	case c == '\'' || c == '"':
		before := l.rest
		err := l.literal()
		return token{kind: text, raw: before[:len(before)-len(l.rest)]}, err
	case c == '`':
		return l.quoted()
	}
	for _, operator := range operators {
		if strings.HasPrefix(string(l.rest[:min(len(l.rest), 3)]), operator) {
			l.advance(len(operator))
			return token{kind: symbol, value: operator}, nil
		}
	}
	// Left out on purpose: '@' (variables), '{' (ODBC escapes), '\' (\N), ':' (assignment).
	if at := strings.IndexByte("(),.;*=<>+-/%!&|^~", c); at >= 0 {
		l.advance(1)
		return token{kind: symbol, value: "(),.;*=<>+-/%!&|^~"[at : at+1]}, nil
	}
	if c == '?' && l.parameters {
		if len(l.rest) > 1 && (isWordByte(l.rest[1]) || l.rest[1] >= 0x80) {
			return token{}, wire.Malformed("a parameter that runs into a word")
		}
		l.advance(1)
		return token{kind: parameter}, nil
	}
	if c == '@' {
		if len(l.rest) > 1 && l.rest[1] == '@' {
			l.advance(2)
			return token{kind: symbol, value: "@@"}, nil
		}
		return token{}, wire.Unsupported("a variable")
	}
	return token{}, wire.Malformed("byte %#02x in a statement", c)
}

func (l *lexer) word() (token, error) {
	n := 1
	for n < len(l.rest) && isWordByte(l.rest[n]) {
		n++
	}
	if n < len(l.rest) && l.rest[n] >= 0x80 {
		return token{}, wire.Unsupported("a name beyond ASCII")
	}
	if n > nameBytesMax {
		return token{}, wire.Malformed("a word of %d bytes", n)
	}
	name := string(l.advance(n))
	t := token{kind: word, value: strings.ToUpper(name), name: name}
	if len(l.rest) > 0 && l.rest[0] == '\'' && len(name) == 1 {
		// x'41', b'01' and n'text' are one literal only without a space between.
		switch t.value {
		case "X":
			return token{kind: text}, l.digitsIn(isHexDigit)
		case "B":
			return token{kind: text}, l.digitsIn(isBit)
		case "N":
			return token{kind: text}, l.literal()
		}
	}
	if !introducers[t.value] {
		return t, nil
	}
	before := *l
	if _, err := l.skip(); err != nil {
		return token{}, err
	}
	if len(l.rest) > 0 && (l.rest[0] == '\'' || l.rest[0] == '"') {
		return token{kind: text}, l.literal()
	}
	*l = before
	return t, nil
}

// number reads an integer, a decimal, a float, 0x and 0b. A letter right behind it would make it a name for MySQL.
func (l *lexer) number() (token, error) {
	n := 0
	digits := func(ok func(byte) bool) {
		for n < len(l.rest) && ok(l.rest[n]) {
			n++
		}
	}
	if len(l.rest) > 2 && l.rest[0] == '0' && (l.rest[1] == 'x' && isHexDigit(l.rest[2]) || l.rest[1] == 'b' && isBit(l.rest[2])) {
		n = 2
		if l.rest[1] == 'x' {
			digits(isHexDigit)
		} else {
			digits(isBit)
		}
	} else {
		digits(isDigit)
		if n < len(l.rest) && l.rest[n] == '.' {
			n++
			digits(isDigit)
		}
		if n < len(l.rest) && (l.rest[n] == 'e' || l.rest[n] == 'E') {
			n++
			if n < len(l.rest) && (l.rest[n] == '+' || l.rest[n] == '-') {
				n++
			}
			if n >= len(l.rest) || !isDigit(l.rest[n]) {
				return token{}, wire.Malformed("a number with an unfinished exponent")
			}
			digits(isDigit)
		}
	}
	if n < len(l.rest) && (isWordByte(l.rest[n]) || l.rest[n] >= 0x80 || l.rest[n] == '.') {
		return token{}, wire.Malformed("a number that runs into a word")
	}
	// A digit right after a word and a dot is the beginning of a name for MySQL.
	if isWordByte(l.prev) || l.prev == '`' {
		return token{}, wire.Malformed("a number right behind a word")
	}
	return token{kind: number, raw: l.advance(n)}, nil
}

// digitsIn passes the quoted part of x'..' and b'..': digits only, without escapes.
func (l *lexer) digitsIn(ok func(byte) bool) error {
	for i := 1; i < len(l.rest); i++ {
		if l.rest[i] == '\'' {
			l.advance(i + 1)
			return nil
		}
		if !ok(l.rest[i]) {
			break
		}
	}
	return wire.Malformed("a hexadecimal or bit literal that does not parse")
}

// literal passes a string in the quotes at the front: a doubled quote and a backslash with any byte belong to it.
func (l *lexer) literal() error {
	quote := l.rest[0]
	for i := 1; i < len(l.rest); i++ {
		switch l.rest[i] {
		case '\\':
			i++
		case quote:
			if i+1 < len(l.rest) && l.rest[i+1] == quote {
				i++
				continue
			}
			l.advance(i + 1)
			return nil
		}
	}
	return wire.Malformed("a string without an end")
}

func (l *lexer) quoted() (token, error) {
	for i := 1; i < len(l.rest); i++ {
		switch c := l.rest[i]; {
		case c == '`':
			if i+1 < len(l.rest) && l.rest[i+1] == '`' {
				return token{}, wire.Unsupported("a backtick in a name")
			}
			name := string(l.rest[1:i])
			if name == "" || len(name) > nameBytesMax || strings.HasSuffix(name, " ") {
				return token{}, wire.Malformed("a quoted name of %d bytes", len(name))
			}
			l.advance(i + 1)
			return token{kind: quoted, name: name}, nil
		case c < 0x20 || c >= 0x7f:
			return token{}, wire.Unsupported("a name beyond printable ASCII")
		}
	}
	return token{}, wire.Malformed("a quoted name without an end")
}

func isDigit(c byte) bool { return c >= '0' && c <= '9' }

func isBit(c byte) bool { return c == '0' || c == '1' }

func isHexDigit(c byte) bool {
	return isDigit(c) || c >= 'a' && c <= 'f' || c >= 'A' && c <= 'F'
}

func isWordStart(c byte) bool {
	return c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c == '_' || c == '$'
}

func isWordByte(c byte) bool { return isWordStart(c) || isDigit(c) }
