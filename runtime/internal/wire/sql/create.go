package sql

import "kalium.dev/kalium/runtime/internal/wire"

// createTable reads what follows CREATE: a plain table with columns and keys. Left out: TEMPORARY (such a table hides
// another of the same name), LIKE and SELECT (they read), foreign keys, partitions, generated columns, and the options
// that reach other tables, files or servers (UNION, DATA DIRECTORY, CONNECTION).
func (p *parser) createTable() {
	p.needWord("TABLE")
	if p.acceptWord("IF") {
		p.needWord("NOT")
		p.needWord("EXISTS")
	}
	p.writes(p.table())
	p.need(symbol, "(")
	if p.atWord("LIKE", "SELECT") {
		p.unexpected()
	}
	p.list(p.element)
	p.need(symbol, ")")
	for p.err == nil && p.tableOption() {
		p.accept(symbol, ",")
	}
}

func (p *parser) element() {
	switch {
	case p.acceptWord("PRIMARY"):
		p.needWord("KEY")
		p.keyColumns()
	case p.acceptWord("UNIQUE"):
		p.acceptWord("KEY", "INDEX")
		p.indexName()
	case p.acceptWord("KEY", "INDEX"):
		p.indexName()
	default:
		p.name()
		p.columnType()
	}
}

func (p *parser) indexName() {
	if !p.at(symbol, "(") {
		p.name()
	}
	p.keyColumns()
}

func (p *parser) keyColumns() {
	p.parenthesised(func() {
		p.name()
		p.size()
		p.acceptWord("ASC", "DESC")
	})
}

func (p *parser) columnType() {
	if p.now().kind != word || !columnTypes[p.now().value] {
		p.unexpected()
	}
	if p.take().value == "DOUBLE" {
		p.acceptWord("PRECISION")
	}
	p.size()
	for p.err == nil {
		switch {
		case p.acceptWord("UNSIGNED", "ZEROFILL", "NULL", "AUTO_INCREMENT"):
		case p.acceptWord("NOT"):
			p.needWord("NULL")
		case p.acceptWord("PRIMARY"):
			p.needWord("KEY")
		case p.acceptWord("UNIQUE"):
			p.acceptWord("KEY")
		case p.atWord("CHARACTER", "CHARSET"):
			p.characterSet()
		case p.acceptWord("COLLATE"):
			p.charset()
		case p.acceptWord("COMMENT"):
			p.needKind(text)
		case p.acceptWord("DEFAULT"):
			p.defaultValue()
		case p.acceptWord("ON"):
			p.needWord("UPDATE")
			p.currentTimestamp()
		default:
			return
		}
	}
}

func (p *parser) defaultValue() {
	switch {
	case p.accept(symbol, "-"), p.accept(symbol, "+"):
		p.needKind(number)
	case p.now().kind == number || p.now().kind == text:
		p.take()
	case p.acceptWord("NULL", "TRUE", "FALSE"):
	default:
		p.currentTimestamp()
	}
}

func (p *parser) currentTimestamp() {
	p.needWord("CURRENT_TIMESTAMP", "NOW")
	if p.accept(symbol, "(") {
		if p.now().kind == number {
			p.take()
		}
		p.need(symbol, ")")
	}
}

func (p *parser) tableOption() bool {
	switch {
	case p.acceptWord("ENGINE"):
		p.accept(symbol, "=")
		if p.now().kind != word || !engines[p.now().value] {
			p.fail(wire.Unsupported("a storage engine that is not on the list of local ones"))
		}
		p.take()
	case p.atWord("DEFAULT", "CHARACTER", "CHARSET", "COLLATE"):
		p.acceptWord("DEFAULT")
		if p.acceptWord("CHARACTER") {
			p.needWord("SET")
		} else {
			p.needWord("CHARSET", "COLLATE")
		}
		p.accept(symbol, "=")
		p.charset()
	case p.acceptWord("AUTO_INCREMENT"):
		p.accept(symbol, "=")
		p.needKind(number)
	case p.acceptWord("COMMENT"):
		p.accept(symbol, "=")
		p.needKind(text)
	default:
		return false
	}
	return true
}
