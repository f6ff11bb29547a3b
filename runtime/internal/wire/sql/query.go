package sql

import (
	"strings"

	"kalium.dev/kalium/runtime/internal/wire"
)

// query reads a query expression: SELECTs joined by UNION, with an ORDER BY and LIMIT of their own. Tables are read.
func (p *parser) query() {
	defer p.enter()()
	for more := true; more && p.err == nil; {
		switch {
		case p.accept(symbol, "("):
			p.query()
			p.need(symbol, ")")
		case p.acceptWord("SELECT"):
			p.selectBody()
		default:
			p.unexpected()
		}
		if more = p.acceptWord("UNION"); more {
			p.acceptWord("ALL", "DISTINCT")
		}
	}
	p.orderBy()
	p.limit()
	p.locking()
}

// selectBody reads what follows SELECT. INTO in any place (OUTFILE, DUMPFILE, variables) is not part of the grammar.
func (p *parser) selectBody() {
	for p.now().kind == word && selectOptions[p.now().value] {
		p.take()
	}
	p.list(p.selectItem)
	if p.acceptWord("FROM") && !p.acceptWord("DUAL") {
		tables := p.tableReferences(nil)
		p.settle(tables, make([]bool, len(tables)))
	}
	p.where()
	if p.acceptWord("GROUP") {
		p.needWord("BY")
		p.list(p.ordered)
		if p.acceptWord("WITH") {
			p.needWord("ROLLUP")
		}
	}
	if p.acceptWord("HAVING") {
		p.expression()
	}
	p.orderBy()
	p.limit()
	p.locking()
}

// list reads one or more items with commas between them.
func (p *parser) list(item func()) {
	for {
		item()
		if p.err != nil || !p.accept(symbol, ",") {
			return
		}
	}
}

// parenthesised reads a list in parentheses.
func (p *parser) parenthesised(item func()) {
	p.need(symbol, "(")
	p.list(item)
	p.need(symbol, ")")
}

func (p *parser) selectItem() {
	if p.accept(symbol, "*") {
		return
	}
	if p.expressionOrStar() {
		return
	}
	if p.acceptWord("AS") {
		if p.now().kind == text {
			p.take()
			return
		}
		p.name()
		return
	}
	if isName(p.now()) {
		p.take()
	}
}

func (p *parser) where() {
	if p.acceptWord("WHERE") {
		p.expression()
	}
}

func (p *parser) ordered() {
	p.expression()
	p.acceptWord("ASC", "DESC")
}

func (p *parser) orderBy() {
	if p.acceptWord("ORDER") {
		p.needWord("BY")
		p.list(p.ordered)
	}
}

func (p *parser) limit() {
	if p.acceptWord("LIMIT") {
		p.rowCount()
		if p.accept(symbol, ",") || p.acceptWord("OFFSET") {
			p.rowCount()
		}
	}
}

func (p *parser) rowCount() {
	if p.now().kind == parameter {
		p.take()
		return
	}
	p.needKind(number)
}

// locking reads the clauses that lock rows. They change what other transactions wait for and not what is read.
func (p *parser) locking() {
	switch {
	case p.acceptWord("FOR"):
		p.needWord("UPDATE", "SHARE")
		switch {
		case p.acceptWord("NOWAIT"):
		case p.acceptWord("SKIP"):
			p.needWord("LOCKED")
		}
	case p.acceptWord("LOCK"):
		p.needWord("IN")
		p.needWord("SHARE")
		p.needWord("MODE")
	}
}

// reference is a table in FROM: its name as policies spell it, and what the statement calls it.
type reference struct {
	name      string
	alias     string // without alias: the table's own part of the name
	hasAlias  bool
	qualified string // schema as written, "" without one
	derived   bool   // a subquery: it has added its own tables, and nothing can be written to it
}

// tableReferences reads tables joined by commas and JOIN, and appends them to known.
func (p *parser) tableReferences(known []reference) []reference {
	defer p.enter()()
	for {
		known = p.joined(known)
		if p.err != nil || !p.accept(symbol, ",") {
			return known
		}
	}
}

func (p *parser) joined(known []reference) []reference {
	known = p.tableFactor(known)
	for p.err == nil {
		natural := p.acceptWord("NATURAL")
		switch {
		case p.acceptWord("LEFT", "RIGHT"):
			p.acceptWord("OUTER")
			p.needWord("JOIN")
		case p.acceptWord("INNER", "CROSS"):
			p.needWord("JOIN")
		case p.acceptWord("JOIN", "STRAIGHT_JOIN"):
		default:
			if natural {
				p.unexpected()
			}
			return known
		}
		known = p.tableFactor(known)
		for p.err == nil && !natural {
			// Several ON may follow several JOIN.
			if p.acceptWord("ON") {
				p.expression()
				continue
			}
			if p.acceptWord("USING") {
				p.parenthesised(func() { p.name() })
				continue
			}
			break
		}
	}
	return known
}

func (p *parser) tableFactor(known []reference) []reference {
	if p.accept(symbol, "(") {
		if !p.atWord("SELECT") {
			known = p.tableReferences(known)
			p.need(symbol, ")")
			return known
		}
		p.query()
		p.need(symbol, ")")
		p.acceptWord("AS")
		return p.refer(known, reference{alias: p.name(), hasAlias: true, derived: true})
	}
	schema := ""
	if p.ahead[1].is(symbol, ".") {
		schema = p.now().name
	}
	table := reference{name: p.table(), qualified: schema}
	table.alias = table.name[strings.LastIndexByte(table.name, '.')+1:]
	if p.acceptWord("AS") {
		table.alias, table.hasAlias = p.name(), true
	} else if isName(p.now()) {
		table.alias, table.hasAlias = p.take().name, true
	}
	// A function in FROM, a partition list, an index hint and FOR SYSTEM_TIME end here as unexpected.
	return p.refer(known, table)
}

func (p *parser) refer(known []reference, table reference) []reference {
	if len(known) == tablesMax {
		p.fail(wire.Unsupported("more than %d tables in a statement", tablesMax))
	}
	return append(known, table)
}

// insert reads what follows INSERT and REPLACE.
func (p *parser) insert() {
	p.acceptWord("LOW_PRIORITY", "DELAYED", "HIGH_PRIORITY")
	p.acceptWord("IGNORE")
	p.acceptWord("INTO")
	p.writes(p.table())
	if p.at(symbol, "(") && !p.ahead[1].is(word, "SELECT") && !p.ahead[1].is(symbol, "(") {
		p.take()
		if !p.accept(symbol, ")") {
			p.list(p.column)
			p.need(symbol, ")")
		}
	}
	switch {
	case p.acceptWord("VALUES", "VALUE"):
		p.list(func() {
			p.need(symbol, "(")
			if !p.accept(symbol, ")") {
				p.list(p.expression)
				p.need(symbol, ")")
			}
		})
	case p.acceptWord("SET"):
		p.list(p.assignment)
	default:
		p.query()
	}
	if p.verb == "insert" && p.acceptWord("ON") {
		p.needWord("DUPLICATE")
		p.needWord("KEY")
		p.needWord("UPDATE")
		p.list(p.assignment)
	}
}

func (p *parser) column() {
	p.name()
	for p.accept(symbol, ".") {
		p.afterDot()
	}
}

func (p *parser) assignment() {
	p.column()
	p.need(symbol, "=")
	p.expression()
}

// update reads what follows UPDATE. Of several tables, those are written whose columns are set; a column without its
// table could belong to any of them.
func (p *parser) update() {
	p.acceptWord("LOW_PRIORITY")
	p.acceptWord("IGNORE")
	tables := p.tableReferences(nil)
	p.needWord("SET")
	single := len(tables) == 1 && !tables[0].derived
	written := make([]bool, len(tables))
	p.list(func() {
		parts := []string{p.name()}
		for p.accept(symbol, ".") {
			parts = append(parts, p.afterDot())
		}
		p.need(symbol, "=")
		p.expression()
		switch {
		case p.err != nil:
		case len(parts) > 3:
			p.unexpected()
		case single && len(parts) == 1:
			written[0] = true
		case len(parts) == 1:
			p.fail(wire.Unsupported("UPDATE of several tables with a column that does not name its table"))
		default:
			p.mark(tables, written, parts[:len(parts)-1])
		}
	})
	p.settle(tables, written)
	p.where()
	p.orderBy()
	p.limit()
}

// delete reads what follows DELETE: one table, or a list of targets before FROM or between FROM and USING.
func (p *parser) delete() {
	for p.acceptWord("LOW_PRIORITY", "QUICK", "IGNORE") {
	}
	if p.acceptWord("FROM") {
		if !p.ahead[1].is(symbol, ",") && !p.ahead[1].is(symbol, ".") && !p.ahead[1].is(word, "USING") {
			p.deleteOne()
			return
		}
		// schema.table and a list of targets begin alike, so the names are read first.
		targets := p.targets()
		if p.acceptWord("USING") {
			p.deleteFrom(targets)
			return
		}
		if len(targets) != 1 || targets[0].star {
			p.unexpected()
			return
		}
		p.writes(p.spelled(targets[0].parts))
		p.deleteRest()
		return
	}
	targets := p.targets()
	p.needWord("FROM")
	p.deleteFrom(targets)
}

// deleteOne reads the form with one unqualified table.
func (p *parser) deleteOne() {
	p.writes(p.table())
	p.deleteRest()
}

func (p *parser) deleteRest() {
	if p.acceptWord("AS") {
		p.name()
	} else if isName(p.now()) {
		p.take()
	}
	p.where()
	p.orderBy()
	p.limit()
}

type target struct {
	parts []string
	star  bool
}

func (p *parser) targets() []target {
	var targets []target
	p.list(func() {
		t := target{parts: []string{p.tablePart(p.name())}}
		for p.accept(symbol, ".") {
			if t.star = p.accept(symbol, "*"); t.star {
				break
			}
			t.parts = append(t.parts, p.tablePart(p.afterDot()))
		}
		if len(t.parts) > 2 || len(targets) == tablesMax {
			p.unexpected()
		}
		targets = append(targets, t)
	})
	return targets
}

func (p *parser) spelled(parts []string) string {
	if len(parts) == 2 && parts[0] != p.schema {
		return parts[0] + "." + parts[1]
	}
	return parts[len(parts)-1]
}

func (p *parser) deleteFrom(targets []target) {
	tables := p.tableReferences(nil)
	written := make([]bool, len(tables))
	for _, t := range targets {
		if p.err == nil {
			p.mark(tables, written, t.parts)
		}
	}
	p.settle(tables, written)
	p.where()
}

// mark finds the one table that [schema.]name means and marks it as written. Names are compared without case, since a
// server may do so: two tables that could be meant are refused.
func (p *parser) mark(tables []reference, written []bool, parts []string) {
	found := -1
	for i, table := range tables {
		match := strings.EqualFold(table.alias, parts[len(parts)-1])
		if match && len(parts) == 2 {
			schema := table.qualified
			if schema == "" {
				schema = p.schema
			}
			match = !table.hasAlias && strings.EqualFold(schema, parts[0])
		}
		if !match {
			continue
		}
		if found >= 0 {
			p.fail(wire.Unsupported("a target that could be one of several tables"))
			return
		}
		found = i
	}
	if found < 0 || tables[found].derived {
		p.fail(wire.Unsupported("a target that is none of the statement's tables"))
		return
	}
	written[found] = true
}

func (p *parser) settle(tables []reference, written []bool) {
	for i, table := range tables {
		switch {
		case table.derived:
		case written[i]:
			p.writes(table.name)
		default:
			p.reads(table.name)
		}
	}
}
