package sql

import "kalium.dev/kalium/runtime/internal/wire"

// expression reads operands with operators between them. It builds nothing: of an expression only the tables of its
// subqueries matter.
func (p *parser) expression() {
	if p.expressionOrStar() {
		p.fail(wire.Malformed("a star inside an expression"))
	}
}

// expressionOrStar is expression, except that t.* is taken too where a SELECT lists its columns.
func (p *parser) expressionOrStar() (star bool) {
	defer p.enter()()
	for first := true; p.err == nil; first = false {
		for p.now().kind == word && prefixWords[p.now().value] || p.now().kind == symbol && prefixSymbols[p.now().value] {
			p.take()
			first = false
		}
		if p.operand() {
			if !first {
				p.fail(wire.Malformed("a star inside an expression"))
			}
			return true
		}
		p.suffixes()
		if !p.operator() {
			return false
		}
	}
	return false
}

// suffixes reads what may follow an operand without a further one.
func (p *parser) suffixes() {
	for p.err == nil {
		switch {
		case p.acceptWord("IS"):
			p.acceptWord("NOT")
			p.needWord("NULL", "TRUE", "FALSE", "UNKNOWN")
		case p.acceptWord("COLLATE"):
			if p.now().kind != word || p.now().value != "BINARY" && reserved[p.now().value] {
				p.unexpected()
			}
			p.take()
		case p.atWord("IN"), p.atWord("NOT") && p.ahead[1].is(word, "IN"):
			p.acceptWord("NOT")
			p.take()
			p.need(symbol, "(")
			if p.atWord("SELECT") {
				p.query()
			} else {
				p.list(p.expression)
			}
			p.need(symbol, ")")
		default:
			return
		}
	}
}

func (p *parser) operator() bool {
	t := p.now()
	if t.is(word, "NOT") && p.ahead[1].kind == word && binaryWords[p.ahead[1].value] {
		p.take()
		t = p.now()
		if t.value == "AND" || t.value == "OR" || t.value == "XOR" || t.value == "DIV" || t.value == "MOD" || t.value == "ESCAPE" {
			p.unexpected()
			return false
		}
	}
	if t.kind == word && binaryWords[t.value] || t.kind == symbol && binarySymbols[t.value] {
		p.take()
		return true
	}
	return false
}

// operand reads one operand and tells whether it was t.*.
func (p *parser) operand() (star bool) {
	t := p.now()
	switch {
	case t.kind == number, t.kind == parameter:
		p.take()
	case t.kind == text:
		// Strings in a row are one string.
		for p.now().kind == text {
			p.take()
		}
	case t.is(symbol, "("):
		p.take()
		if p.atWord("SELECT") {
			p.query()
		} else {
			p.list(p.expression)
		}
		p.need(symbol, ")")
	case t.kind == quoted:
		return p.columnOrStar()
	case t.kind != word:
		p.unexpected()
	default:
		return p.wordOperand(t)
	}
	return false
}

func (p *parser) wordOperand(t token) (star bool) {
	call := p.ahead[1].is(symbol, "(")
	switch t.value {
	case "CASE":
		p.take()
		p.caseWhen()
		return false
	case "EXISTS":
		p.take()
		p.subquery()
		return false
	case "ANY", "SOME", "ALL":
		if call {
			p.take()
			p.subquery()
			return false
		}
	case "CAST":
		if call {
			p.take()
			p.cast()
			return false
		}
	case "CONVERT":
		p.take()
		p.convert()
		return false
	case "INTERVAL":
		p.take()
		p.expression()
		p.unit()
		return false
	case "DATE", "TIME", "TIMESTAMP":
		if p.ahead[1].kind == text {
			p.take()
			p.take()
			return false
		}
	}
	if call {
		// A built-in name with a space before its parenthesis may be a stored function's ("Function Name Parsing").
		if !functions[t.value] || !p.ahead[1].touches {
			p.fail(wire.Unsupported("a function that is not on the list of harmless ones"))
			return false
		}
		p.take()
		p.take()
		p.arguments(t.value)
		return false
	}
	if constants[t.value] {
		p.take()
		return false
	}
	return p.columnOrStar()
}

// columnOrStar reads [[schema.]table.]column, or with a star in the column's place.
func (p *parser) columnOrStar() (star bool) {
	p.name()
	for parts := 1; p.err == nil && p.accept(symbol, "."); parts++ {
		if parts == 3 {
			p.unexpected()
			return false
		}
		if p.accept(symbol, "*") {
			return true
		}
		p.afterDot()
	}
	if p.at(symbol, "(") {
		p.fail(wire.Unsupported("a function that is not on the list of harmless ones"))
	}
	return false
}

func (p *parser) subquery() {
	p.need(symbol, "(")
	p.query()
	p.need(symbol, ")")
}

func (p *parser) caseWhen() {
	if !p.atWord("WHEN") {
		p.expression()
	}
	p.needWord("WHEN")
	for more := true; more && p.err == nil; more = p.acceptWord("WHEN") {
		p.expression()
		p.needWord("THEN")
		p.expression()
	}
	if p.acceptWord("ELSE") {
		p.expression()
	}
	p.needWord("END")
}

func (p *parser) cast() {
	p.need(symbol, "(")
	p.expression()
	p.needWord("AS")
	p.castType()
	p.need(symbol, ")")
}

func (p *parser) convert() {
	p.need(symbol, "(")
	p.expression()
	if p.acceptWord("USING") {
		p.charset()
	} else {
		p.need(symbol, ",")
		p.castType()
	}
	p.need(symbol, ")")
}

func (p *parser) castType() {
	if p.now().kind != word || !castTypes[p.now().value] {
		p.unexpected()
	}
	p.take()
	p.acceptWord("INTEGER", "INT")
	p.size()
	p.characterSet()
}

// size reads (n) or (n,m) if it is there.
func (p *parser) size() {
	if p.accept(symbol, "(") {
		p.needKind(number)
		if p.accept(symbol, ",") {
			p.needKind(number)
		}
		p.need(symbol, ")")
	}
}

func (p *parser) characterSet() {
	switch {
	case p.acceptWord("CHARACTER"):
		p.needWord("SET")
		p.charset()
	case p.acceptWord("CHARSET"):
		p.charset()
	}
}

func (p *parser) charset() {
	if p.now().kind != word || p.now().value != "BINARY" && reserved[p.now().value] {
		p.unexpected()
	}
	p.take()
}

func (p *parser) unit() {
	if p.now().kind != word || !units[p.now().value] {
		p.unexpected()
	}
	p.take()
}

// arguments reads up to and with the closing parenthesis of a call.
func (p *parser) arguments(function string) {
	if p.accept(symbol, ")") {
		return
	}
	switch function {
	case "COUNT":
		if p.accept(symbol, "*") {
			p.need(symbol, ")")
			return
		}
	case "EXTRACT":
		p.unit()
		p.needWord("FROM")
	case "TIMESTAMPADD", "TIMESTAMPDIFF":
		p.unit()
		p.need(symbol, ",")
	case "TRIM":
		if p.acceptWord("BOTH", "LEADING", "TRAILING") && p.acceptWord("FROM") {
			p.expression()
			p.need(symbol, ")")
			return
		}
	}
	p.acceptWord("DISTINCT")
	p.list(p.expression)
	switch function {
	case "TRIM", "SUBSTRING", "SUBSTR", "MID":
		if p.acceptWord("FROM") {
			p.expression()
			if p.acceptWord("FOR") {
				p.expression()
			}
		}
	case "GROUP_CONCAT":
		p.orderBy()
		if p.acceptWord("SEPARATOR") {
			p.needKind(text)
		}
	case "CHAR":
		if p.acceptWord("USING") {
			p.charset()
		}
	}
	p.need(symbol, ")")
}
