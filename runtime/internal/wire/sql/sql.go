// Package sql classifies one SQL statement of MySQL's or MariaDB's dialect into a verb and the sets of tables that it
// reads and writes.
//
// It is a whole parser of a narrow grammar and not a search for keywords: a statement that it cannot derive to its last
// token is refused. What a server does behind a name is out of its sight: views and triggers touch further tables.
// It holds for servers with the default lexical sql_mode, without ANSI_QUOTES and NO_BACKSLASH_ESCAPES; a function
// cannot change the mode, since SET is a closed list.
package sql

import (
	"slices"
	"strings"

	"kalium.dev/kalium/runtime/internal/policy"
	"kalium.dev/kalium/runtime/internal/wire"
)

// Bounds of a statement.
const (
	StatementBytesMax = 1 << 20
	nameBytesMax      = 64 // both manuals, "Identifier Length Limits"
	tablesMax         = 32
	depthMax          = 48 // nested parentheses and subqueries
)

// Statement is the normalised identity of a statement. Text never holds a literal of it.
type Statement struct {
	Support bool     // carries messages and is none: never moves a cursor
	Verb    string   // in the spelling of the compiled policy; "" for support traffic
	Read    []string // sorted; a table of another schema as schema.table
	Write   []string // as Read; a table that is only written is not in Read
	Text    string
}

// Classify reads the text of one COM_QUERY on a connection whose default schema is schema.
func Classify(statement []byte, schema string) (Statement, error) {
	return classify(lexer{rest: statement}, schema)
}

// ClassifyPrepared reads the text of one COM_STMT_PREPARE: a question mark stands for a value that comes later.
func ClassifyPrepared(statement []byte, schema string) (Statement, error) {
	return classify(lexer{rest: statement, parameters: true}, schema)
}

func classify(l lexer, schema string) (Statement, error) {
	if len(l.rest) > StatementBytesMax {
		return Statement{}, wire.TooLarge("a statement of %d bytes", len(l.rest))
	}
	p := parser{lexer: l, schema: schema}
	p.fill()
	p.fill()
	support := p.statement()
	if p.err == nil {
		p.accept(symbol, ";")
		if p.now().kind != end {
			p.unexpected()
		}
	}
	if p.err != nil {
		return Statement{}, p.err
	}
	if support != "" {
		return Statement{Support: true, Text: "mysql " + support}, nil
	}
	slices.Sort(p.read)
	slices.Sort(p.write)
	result := Statement{Verb: p.verb, Read: slices.Compact(p.read), Write: slices.Compact(p.write)}
	message := policy.Message{Kind: policy.KindMySQL, Verb: result.Verb, Read: result.Read, Write: result.Write}
	result.Text = message.Text()
	return result, nil
}

// parser derives the statement from left to right with two tokens of look-ahead. The first refusal stays in err and
// replaces the rest of the statement by its end, so every loop stops.
type parser struct {
	lexer  lexer
	ahead  [2]token
	schema string
	depth  int
	err    error

	verb        string
	read, write []string
}

func (p *parser) fill() {
	p.ahead[0] = p.ahead[1]
	if p.err != nil {
		p.ahead[1] = token{}
		return
	}
	t, err := p.lexer.next()
	if err != nil {
		p.fail(err)
		return
	}
	p.ahead[1] = t
}

func (p *parser) fail(err error) {
	if p.err == nil {
		p.err = err
	}
	p.ahead = [2]token{}
}

func (p *parser) now() token { return p.ahead[0] }

// take returns the current token and moves on.
func (p *parser) take() token {
	t := p.ahead[0]
	p.fill()
	return t
}

// unexpected names reserved words and punctuation only; anything else could be payload.
func (p *parser) unexpected() {
	t := p.now()
	switch {
	case t.kind == end:
		p.fail(wire.Malformed("the statement ends too early"))
	case t.kind == word && reserved[t.value]:
		p.fail(wire.Unsupported("%s at this place of a statement", t.value))
	case t.is(symbol, ";"):
		p.fail(wire.Unsupported("more than one statement"))
	case t.is(symbol, "@@"):
		p.fail(wire.Unsupported("a system variable"))
	case t.kind == symbol:
		p.fail(wire.Malformed("%q at this place of a statement", t.value))
	default:
		p.fail(wire.Unsupported("a word or literal at this place of a statement"))
	}
}

func (p *parser) at(kind kind, value string) bool { return p.now().is(kind, value) }

func (p *parser) atWord(values ...string) bool {
	return p.now().kind == word && slices.Contains(values, p.now().value)
}

func (p *parser) accept(kind kind, value string) bool {
	if !p.at(kind, value) {
		return false
	}
	p.take()
	return true
}

func (p *parser) acceptWord(values ...string) bool {
	if !p.atWord(values...) {
		return false
	}
	p.take()
	return true
}

func (p *parser) need(kind kind, value string) {
	if !p.accept(kind, value) {
		p.unexpected()
	}
}

func (p *parser) needWord(values ...string) {
	if !p.acceptWord(values...) {
		p.unexpected()
	}
}

func (p *parser) needKind(kind kind) {
	if p.now().kind != kind {
		p.unexpected()
		return
	}
	p.take()
}

// enter counts a level of nesting; the returned function leaves it.
func (p *parser) enter() func() {
	if p.depth++; p.depth > depthMax {
		p.fail(wire.Unsupported("a statement nested deeper than %d", depthMax))
	}
	return func() { p.depth-- }
}

// isName tells whether t can be a name at a place where keywords could stand too.
func isName(t token) bool { return t.kind == quoted || t.kind == word && !reserved[t.value] }

func (p *parser) name() string {
	if !isName(p.now()) {
		p.unexpected()
		return ""
	}
	return p.take().name
}

// afterDot takes a name behind a dot, where keywords are names.
func (p *parser) afterDot() string {
	if p.now().kind != word && p.now().kind != quoted {
		p.unexpected()
		return ""
	}
	return p.take().name
}

// table reads [schema.]table and returns its spelling in a policy: without the peer's own schema.
func (p *parser) table() string {
	first := p.tablePart(p.name())
	if !p.accept(symbol, ".") {
		return first
	}
	second := p.tablePart(p.afterDot())
	if first == p.schema {
		return second
	}
	return first + "." + second
}

// tablePart keeps names to letters, digits, '_', '$' and '-': with a dot or a comma inside, one table's name would be
// another pair's.
func (p *parser) tablePart(name string) string {
	for i := range len(name) {
		if !isWordByte(name[i]) && name[i] != '-' {
			p.fail(wire.Unsupported("a table's name with byte %#02x", name[i]))
			return ""
		}
	}
	return name
}

func (p *parser) reads(table string) { p.read = p.add(p.read, table) }

func (p *parser) writes(table string) { p.write = p.add(p.write, table) }

func (p *parser) add(tables []string, table string) []string {
	if len(tables) == tablesMax {
		p.fail(wire.Unsupported("more than %d tables in a statement", tablesMax))
		return tables
	}
	return append(tables, table)
}

// statement returns the text of support traffic, or "" after it has filled verb and tables.
func (p *parser) statement() (support string) {
	first := p.now()
	switch {
	case p.atWord("SELECT") && p.ahead[1].is(symbol, "@@"):
		// mysql-connector-python asks so before it writes its first literal.
		p.take()
		p.sessionVariable("SQL_MODE")
		return "select session sql_mode"
	case p.atWord("SELECT"), p.at(symbol, "("):
		p.verb = "select"
		p.query()
	case p.acceptWord("INSERT"):
		p.verb = "insert"
		p.insert()
	case p.acceptWord("REPLACE"):
		p.verb = "replace"
		p.insert()
	case p.acceptWord("UPDATE"):
		p.verb = "update"
		p.update()
	case p.acceptWord("DELETE"):
		p.verb = "delete"
		p.delete()
	case p.acceptWord("SHOW"):
		// SHOW TABLES FROM another schema is not this schema's list, so only LIKE may follow.
		p.verb = "show-tables"
		p.needWord("TABLES")
		if p.acceptWord("LIKE") {
			p.needKind(text)
		}
	case p.acceptWord("START"):
		p.verb = "begin"
		p.needWord("TRANSACTION")
		switch {
		case p.acceptWord("READ"):
			p.needWord("ONLY", "WRITE")
		case p.acceptWord("WITH"):
			p.needWord("CONSISTENT")
			p.needWord("SNAPSHOT")
		}
	case p.acceptWord("BEGIN"):
		p.verb = "begin"
		p.acceptWord("WORK")
	case p.acceptWord("COMMIT"):
		p.verb = "commit"
		p.acceptWord("WORK")
	case p.acceptWord("ROLLBACK"):
		p.verb = "rollback"
		p.acceptWord("WORK")
	case p.acceptWord("CREATE"):
		p.verb = "create-table"
		p.createTable()
	case p.acceptWord("SET"):
		return p.set()
	case first.kind == end && p.err == nil:
		p.fail(wire.Malformed("an empty statement"))
	default:
		if first.kind == word && (reserved[first.value] || refusedVerbs[first.value]) {
			p.fail(wire.Unsupported("statement %s", first.value))
		}
		p.unexpected()
	}
	return ""
}

// refusedVerbs are not reserved but worth a name in a refusal.
var refusedVerbs = set(`DEALLOCATE DO FLUSH INSTALL UNINSTALL RESET SAVEPOINT SHUTDOWN TRUNCATE XA HELP CACHE STOP
CHECKSUM REPAIR BACKUP BINLOG CLONE IMPORT`)

// set reads the closed list of session settings. Everything else could change how statements are read (sql_mode,
// character sets) or what they reach.
func (p *parser) set() string {
	if p.acceptWord("NAMES") {
		charset := p.plainWord()
		if charset != "utf8mb4" && charset != "latin1" && charset != "binary" {
			p.fail(wire.Unsupported("a character set other than utf8mb4, latin1 and binary"))
		}
		if p.acceptWord("COLLATE") {
			if collation := p.plainWord(); collation != charset && !strings.HasPrefix(collation, charset+"_") {
				p.fail(wire.Unsupported("a collation of another character set"))
			}
		}
		return "set names " + charset
	}
	if p.at(symbol, "@@") || p.atWord("AUTOCOMMIT") {
		if !p.acceptWord("AUTOCOMMIT") {
			p.sessionVariable("AUTOCOMMIT")
		}
		p.need(symbol, "=")
		if !p.acceptWord("ON", "OFF") {
			if raw := string(p.now().raw); p.now().kind != number || raw != "0" && raw != "1" {
				p.unexpected()
			}
			p.take()
		}
		return "set autocommit"
	}
	p.fail(wire.Unsupported("a SET other than NAMES and AUTOCOMMIT"))
	return ""
}

// sessionVariable reads @@session.NAME without a space in it.
func (p *parser) sessionVariable(name string) {
	p.need(symbol, "@@")
	for _, part := range []token{{kind: word, value: "SESSION"}, {kind: symbol, value: "."}, {kind: word, value: name}} {
		if !p.at(part.kind, part.value) || !p.now().touches {
			p.fail(wire.Unsupported("a system variable"))
			return
		}
		p.take()
	}
}

// plainWord reads a word, or a string of plain letters in quotes, in lower case.
func (p *parser) plainWord() string {
	t := p.take()
	plain := t.name
	if t.kind == text && len(t.raw) > 2 {
		plain = string(t.raw[1 : len(t.raw)-1])
	}
	for i := range len(plain) {
		if !isWordByte(plain[i]) {
			plain = ""
			break
		}
	}
	if plain == "" && p.err == nil {
		p.fail(wire.Malformed("a name is expected in SET"))
	}
	return strings.ToLower(plain)
}
