package smtp

import (
	"slices"
	"strconv"
	"strings"

	"kalium.dev/kalium/runtime/internal/policy"
	"kalium.dev/kalium/runtime/internal/wire"
)

// refusedVerbs is for people who read a refusal. HELP is harmless, but no program needs it.
var refusedVerbs = []string{"VRFY", "EXPN", "HELP", "ETRN", "ATRN", "TURN", "SEND", "SOML", "SAML", "XCLIENT", "XFORWARD", "BURL"}

// command reads a line of the client that is neither text nor a part of an authentication.
func (c *Client) command(line []byte) (Unit, error) {
	verb, args, hasArgs := strings.Cut(string(line), " ")
	verb = strings.ToUpper(verb)
	if verb != "AUTH" && len(line)+2 > commandBytesMax {
		return Unit{}, wire.TooLarge("a command of more than %d bytes", commandBytesMax)
	}
	upkeep := verb == "NOOP" || verb == "RSET" || verb == "QUIT"
	if hasArgs && (upkeep || verb == "DATA" || verb == "STARTTLS") {
		return Unit{}, wire.Malformed("%s with a parameter", verb)
	}
	if c.replies.lost && !upkeep {
		return Unit{}, wire.Unsupported("%s, where the server's replies cannot be followed", policy.Printable(verb, 16))
	}
	switch verb {
	case "EHLO", "HELO":
		return c.hello(verb, args)
	case "NOOP":
		return c.support(verb, toOther)
	case "RSET":
		c.forget()
		return c.support(verb, toReset)
	case "QUIT":
		c.phase = ended
		return c.support(verb, toOther)
	case "AUTH":
		return c.auth(args)
	case "STARTTLS":
		return c.startTLS()
	case "MAIL":
		return c.mail(args)
	case "RCPT":
		return c.recipient(args)
	case "DATA":
		return c.data()
	case "BDAT":
		return c.bdat(args)
	}
	if slices.Contains(refusedVerbs, verb) {
		return Unit{}, wire.Unsupported("%s", verb)
	}
	return Unit{}, wire.Unsupported("a command that is not on the list")
}

func (c *Client) support(verb string, to command) (Unit, error) {
	if err := c.expect(to); err != nil {
		return Unit{}, err
	}
	return Unit{Kind: Support, Text: "smtp " + strings.ToLower(verb)}, nil
}

// expect notes that a command leaves which the server will reply to.
func (c *Client) expect(to command) error {
	if c.inTLS || c.replies.lost {
		return nil
	}
	if c.replies.open == commandsMax {
		return wire.TooLarge("more than %d commands without a reply", commandsMax)
	}
	c.replies.push(to)
	return nil
}

// forget drops the envelope.
func (c *Client) forget() {
	c.hasSender, c.isChunked, c.isUnsure = false, false, false
	c.from, c.to, c.recipients, c.text = "", nil, 0, text{}
}

// hello reads EHLO and HELO. A server that does not like the name stays as it is, so they are no way to drop an envelope.
func (c *Client) hello(verb, name string) (Unit, error) {
	if c.hasSender {
		return Unit{}, wire.Malformed("%s inside a mail", verb)
	}
	if name == "" || len(name) > domainBytesMax {
		return Unit{}, wire.Malformed("%s with a name of %d bytes", verb, len(name))
	}
	for i := range len(name) {
		if !isAlphanumeric(name[i]) && strings.IndexByte(".-_:[]", name[i]) < 0 {
			return Unit{}, wire.Malformed("byte %#02x in the name of %s", name[i], verb)
		}
	}
	to := toHELO
	if verb == "EHLO" {
		to = toEHLO
	}
	return c.support(verb, to)
}

// auth reads AUTH. An envelope that the server may hold would let a line of it, read as a command by a server that refuses
// the authentication, send a mail.
func (c *Client) auth(args string) (Unit, error) {
	if c.hasSender || c.isUnsure {
		return Unit{}, wire.Unsupported("AUTH inside a mail, or behind one without RSET")
	}
	mechanism, initial, hasInitial := strings.Cut(args, " ")
	switch strings.ToUpper(mechanism) {
	case "PLAIN", "LOGIN", "CRAM-MD5":
	default:
		return Unit{}, wire.Unsupported("a mechanism of AUTH other than PLAIN, LOGIN and CRAM-MD5")
	}
	if hasInitial && (initial == "" || initial != "=" && !isBase64(initial)) {
		return Unit{}, wire.Malformed("an initial response of AUTH")
	}
	if c.phase = awaitingAuth; c.inTLS {
		c.phase = inAuth
	}
	c.authLines = 0
	return c.support("auth", toAuth)
}

// authLine reads a line behind AUTH. In clear the server has asked for it. Inside TLS it is not known whether the server
// goes on with the authentication, so what can only be a command is one.
func (c *Client) authLine(line []byte) (Unit, error) {
	if c.inTLS {
		switch verb := strings.ToUpper(string(line)); {
		case verb == "QUIT", verb == "RSET", verb == "NOOP", len(line) > 1 && !isBase64(string(line)):
			c.phase = inCommands
			return c.command(line)
		}
	}
	if s := string(line); s != "*" && s != "" && !isBase64(s) {
		return Unit{}, wire.Malformed("a line of an authentication that is not base64")
	}
	if c.authLines++; c.authLines > authLinesMax {
		return Unit{}, wire.Malformed("more than %d lines of an authentication", authLinesMax)
	}
	if !c.inTLS {
		c.phase = awaitingAuth
	}
	return c.support("auth", toAuth)
}

// startTLS reads STARTTLS.
func (c *Client) startTLS() (Unit, error) {
	switch {
	case c.inTLS:
		return Unit{}, wire.Unsupported("STARTTLS inside TLS")
	case c.hasSender:
		return Unit{}, wire.Malformed("STARTTLS inside a mail")
	case c.replies.open > 0:
		return Unit{}, wire.Malformed("STARTTLS before the replies to all commands")
	}
	c.replies.push(toStartTLS)
	c.phase = awaitingTLS
	return Unit{Kind: StartTLS, Text: "smtp starttls"}, nil
}

// mail reads MAIL.
func (c *Client) mail(args string) (Unit, error) {
	if c.hasSender {
		return Unit{}, wire.Malformed("MAIL inside a mail")
	}
	sender, parameters, err := path("FROM:", args)
	if err != nil {
		return Unit{}, err
	}
	if err := mailParameters(parameters); err != nil {
		return Unit{}, err
	}
	if c.isUnsure && sender != c.from {
		return Unit{}, wire.Unsupported("another sender inside TLS without RSET behind the last mail")
	}
	if err := c.expect(toMail); err != nil {
		return Unit{}, err
	}
	c.hasSender, c.from = true, sender
	c.mails++
	return c.envelope(Envelope), nil
}

// recipient reads RCPT.
func (c *Client) recipient(args string) (Unit, error) {
	if !c.hasSender || c.isChunked {
		return Unit{}, wire.Malformed("RCPT without MAIL, or behind BDAT")
	}
	recipient, parameters, err := path("TO:", args)
	if err != nil {
		return Unit{}, err
	}
	if parameters != "" {
		return Unit{}, wire.Unsupported("a parameter of RCPT")
	}
	at, found := slices.BinarySearch(c.to, recipient)
	if !found {
		if len(c.to) == recipientsMax {
			return Unit{}, wire.TooLarge("more than %d recipients", recipientsMax)
		}
		c.to = slices.Insert(c.to, at, recipient)
	}
	if err := c.expect(toOther); err != nil {
		return Unit{}, err
	}
	c.recipients++
	return c.envelope(Envelope), nil
}

func (c *Client) envelope(kind Kind) Unit {
	verb := "smtp envelope"
	if kind == Mail {
		verb = "smtp mail"
	}
	verb += " from " + c.from
	if len(c.to) > 0 {
		verb += " to " + strings.Join(c.to, ",")
	}
	return Unit{Kind: kind, Text: policy.Printable(verb, policy.MessageTextMax), From: c.from, To: slices.Clone(c.to)}
}

// data reads DATA.
func (c *Client) data() (Unit, error) {
	if c.recipients == 0 || c.isChunked {
		return Unit{}, wire.Malformed("DATA without recipients, or behind BDAT")
	}
	if err := c.expect(toData); err != nil {
		return Unit{}, err
	}
	if c.phase = awaitingText; c.inTLS {
		c.phase = inText
	}
	return c.envelope(Mail), nil
}

// bdat reads BDAT; the chunk follows at once. In clear the envelope has to be settled first: a MAIL that a server refused
// because it holds an older envelope would turn this mail into one of the older sender.
func (c *Client) bdat(args string) (Unit, error) {
	size, last, hasLast := strings.Cut(args, " ")
	if hasLast && !strings.EqualFold(last, "LAST") {
		return Unit{}, wire.Malformed("a parameter of BDAT")
	}
	bytes, err := strconv.ParseUint(size, 10, 63)
	if err != nil || len(size) > chunkDigitsMax || size[0] == '+' {
		return Unit{}, wire.Malformed("the size of a chunk")
	}
	u := Unit{Kind: Support, Text: "smtp bdat"}
	if !c.isChunked {
		switch {
		case c.recipients == 0:
			return Unit{}, wire.Malformed("BDAT without recipients")
		case !c.inTLS && !c.replies.chunking:
			return Unit{}, wire.Unsupported("BDAT for a server that has not announced CHUNKING")
		case !c.inTLS && c.replies.open > 0:
			return Unit{}, wire.Unsupported("BDAT before the replies to MAIL and RCPT")
		}
		u = c.envelope(Mail)
		c.text = text{}
	}
	if err := c.expect(toOther); err != nil {
		return Unit{}, err
	}
	c.isChunked, c.phase, c.chunk, c.isLast = true, inChunk, int64(bytes), hasLast
	if bytes == 0 {
		if err := c.endChunk(); err != nil {
			return Unit{}, err
		}
		u.End = c.phase == inCommands && hasLast
	}
	return u, nil
}

// sent ends a mail.
func (c *Client) sent() {
	if !c.inTLS {
		c.forget()
		return
	}
	c.hasSender, c.isChunked, c.recipients, c.isUnsure = false, false, 0, true
}

// answered takes a reply of the server.
func (c *Client) answered(r reply) {
	to, ok := c.replies.pop()
	if !ok {
		c.replies.lost = true
		return
	}
	isGood := r.code/100 == 2
	switch to {
	case toGreeting:
		c.replies.greeted = true
	case toEHLO, toHELO:
		if isGood {
			c.replies.chunking = to == toEHLO && r.chunking
		}
	case toReset:
		c.replies.lost = !isGood
	case toMail:
		// A later MAIL has an envelope of its own, which RSET began.
		if c.mailsAnswered++; !isGood && c.mailsAnswered == c.mails {
			c.forget()
		}
	case toData:
		switch {
		case r.code != codeText:
			c.phase = inCommands // the server keeps the envelope, and so do we
		case !c.hasSender && c.refused == nil:
			c.refused = wire.Unsupported("the text of a mail whose sender the server has refused")
		default:
			c.phase = inText
		}
	case toAuth:
		if c.phase = inCommands; r.code == codeGoOn {
			c.phase = inAuth
		}
	case toStartTLS:
		c.phase = inCommands
		if r.code == codeReady {
			c.inTLS = true
			c.forget()
		}
	}
}
