package policy

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"strconv"
	"strings"
	"unicode/utf8"
)

// Bounds of a compiled policy. They keep a step's cost and a verdict's size small whatever the policy says; the
// compiler in kalium/policy refuses beyond the same numbers.
const (
	compiledBytesMax = 700 * 1024 // in base64 inside a frame of 1 MiB
	symbolsMax       = 1024
	labelsMax        = 2048 // of an app CFG
	statesMax        = 4096
	edgesMax         = 65536
	functionsMax     = 512
	peersMax         = 256
	listMax          = 64 // tables of a statement, query keys, segments of a path, recipients
	nameBytesMax     = 255
	deadlineMSMax    = 60_000
	timeoutMSMax     = 3_600_000
	bodyBytesMax     = 1 << 30
	retriesMax       = 3
	inflightMax      = 16
	depthMax         = 12
)

// Format is the only compiled form that this package reads.
const Format = "kalium-compiled/v3"

// Verbs are the mysql verbs of a compiled policy.
var verbs = map[string]bool{
	"show-tables": true, "select": true, "insert": true, "update": true, "delete": true, "replace": true,
	"begin": true, "commit": true, "rollback": true, "create-table": true,
}

// Error says what is wrong with a policy or its envelope. A policy with an error is refused whole; the last good one
// stays.
type Error struct {
	Code string // policy.malformed or policy.signature
	Text string // where in the document, and what was found
}

// Error implements error in the form that every program of ours prints.
func (e *Error) Error() string {
	next := "compile it again with `kalium policy compile`"
	if e.Code == "policy.signature" {
		next = "sign it again with `kalium policy sign` and the key whose public half the runtime was given"
	}
	return fmt.Sprintf("error[%s]: cannot load a policy: %s\nnext: %s", e.Code, e.Text, next)
}

func malformed(format string, args ...any) error {
	return &Error{Code: "policy.malformed", Text: Printable(fmt.Sprintf(format, args...), MessageTextMax)}
}

// Parse reads a compiled policy. It is strict: a field that is unknown, missing, twice there or out of its bounds
// refuses the whole policy, because a policy that is read in part allows something that nobody meant.
func Parse(compiled []byte) (*Policy, error) {
	if len(compiled) > compiledBytesMax {
		return nil, malformed("%d bytes, at most %d", len(compiled), compiledBytesMax)
	}
	document, err := decode(compiled)
	if err != nil {
		return nil, err
	}
	c := &checker{}
	policy := c.policy(document)
	if c.err != nil {
		return nil, c.err
	}
	policy.SHA256 = sha256.Sum256(compiled)
	return policy, nil
}

// decode reads one JSON value without what encoding/json forgives: names twice in an object, other spellings of a
// field's case, deep nesting, bytes behind the value.
func decode(data []byte) (any, error) {
	// The decoder would put a replacement character in the place of bytes that are not UTF-8, and two texts that differ
	// would be read as one.
	if !utf8.Valid(data) {
		return nil, malformed("not UTF-8")
	}
	decoder := json.NewDecoder(bytes.NewReader(data))
	decoder.UseNumber()
	value, err := decodeValue(decoder, 0)
	if err != nil {
		return nil, err
	}
	if _, err := decoder.Token(); err != io.EOF {
		return nil, malformed("bytes follow the document")
	}
	return value, nil
}

func decodeValue(decoder *json.Decoder, depth int) (any, error) {
	if depth > depthMax {
		return nil, malformed("nested deeper than %d", depthMax)
	}
	token, err := decoder.Token()
	if err != nil {
		return nil, malformed("not JSON at byte %d: %v", decoder.InputOffset(), err)
	}
	switch token {
	case json.Delim('{'):
		object := map[string]any{}
		for decoder.More() {
			name, err := decoder.Token()
			if err != nil {
				return nil, malformed("not JSON at byte %d: %v", decoder.InputOffset(), err)
			}
			key := name.(string) // the decoder yields nothing else in a name's place
			if _, twice := object[key]; twice {
				return nil, malformed("field %q appears twice", key)
			}
			if object[key], err = decodeValue(decoder, depth+1); err != nil {
				return nil, err
			}
		}
		return object, closing(decoder)
	case json.Delim('['):
		list := []any{}
		for decoder.More() {
			element, err := decodeValue(decoder, depth+1)
			if err != nil {
				return nil, err
			}
			list = append(list, element)
		}
		return list, closing(decoder)
	default:
		return token, nil
	}
}

func closing(decoder *json.Decoder) error {
	if _, err := decoder.Token(); err != nil {
		return malformed("not JSON at byte %d: %v", decoder.InputOffset(), err)
	}
	return nil
}

// checker turns decoded JSON into a Policy. The first fault stays in err and makes every later question answer with
// a zero value, so that each field can be read on a line of its own.
type checker struct{ err error }

func (c *checker) fail(format string, args ...any) {
	if c.err == nil {
		c.err = malformed(format, args...)
	}
}

// object reads an object that has all required fields, and beyond them only optional ones.
func (c *checker) object(value any, path string, required, optional string) map[string]any {
	object, ok := value.(map[string]any)
	if !ok {
		c.fail("%s is not an object", path)
		return nil
	}
	known := map[string]bool{}
	for _, name := range strings.Fields(required) {
		known[name] = true
		if _, there := object[name]; !there {
			c.fail("%s has no field %q", path, name)
			return nil
		}
	}
	for _, name := range strings.Fields(optional) {
		known[name] = true
	}
	for name := range object {
		if !known[name] {
			c.fail("%s has an unknown field %q", path, name)
			return nil
		}
	}
	return object
}

func (c *checker) names(value any, path string, max int) map[string]any {
	object, ok := value.(map[string]any)
	if !ok || len(object) > max {
		c.fail("%s is not an object of at most %d names", path, max)
		return nil
	}
	for name := range object {
		c.checkName(name, path)
	}
	return object
}

func (c *checker) checkName(name, path string) {
	if name == "" || len(name) > nameBytesMax || Printable(name, len(name)) != name || strings.ContainsAny(name, " \"'\\") {
		c.fail("%s: %q is no name", path, name)
	}
}

func (c *checker) text(value any, path string, max int) string {
	text, ok := value.(string)
	if !ok || len(text) > max {
		c.fail("%s is not a text of at most %d bytes", path, max)
		return ""
	}
	return text
}

func (c *checker) name(value any, path string) string {
	name := c.text(value, path, nameBytesMax)
	if c.err == nil {
		c.checkName(name, path)
	}
	return name
}

func (c *checker) integer(value any, path string, low, high int64) int64 {
	number, ok := value.(json.Number)
	if ok {
		// ParseInt refuses fractions and exponents: 1e3 is a number in JSON and not how a compiler writes 1000.
		if n, err := strconv.ParseInt(number.String(), 10, 64); err == nil && n >= low && n <= high {
			return n
		}
	}
	c.fail("%s is not a whole number from %d to %d", path, low, high)
	return low
}

func (c *checker) list(value any, path string, max int) []any {
	list, ok := value.([]any)
	if !ok || len(list) > max {
		c.fail("%s is not a list of at most %d", path, max)
		return nil
	}
	return list
}

// sortedNames reads a list of names in strictly rising order: sets have one spelling.
func (c *checker) sortedNames(value any, path string) []string {
	list := c.list(value, path, listMax)
	names := make([]string, 0, len(list))
	for i, element := range list {
		name := c.name(element, path)
		if i > 0 && c.err == nil && name <= names[i-1] {
			c.fail("%s is not sorted", path)
		}
		names = append(names, name)
	}
	return names
}

func (c *checker) oneOf(value any, path string, allowed ...string) string {
	text := c.text(value, path, nameBytesMax)
	for _, candidate := range allowed {
		if text == candidate {
			return text
		}
	}
	c.fail("%s is %q, not one of %s", path, text, strings.Join(allowed, ", "))
	return ""
}

func (c *checker) boolean(value any, path string) bool {
	flag, ok := value.(bool)
	if !ok {
		c.fail("%s is neither true nor false", path)
	}
	return flag
}

func (c *checker) mode(value any, path string) Mode {
	name := c.oneOf(value, path, "off", "learn", "audit", "enforce")
	for m := ModeOff; m <= ModeEnforce; m++ {
		if m.String() == name {
			return m
		}
	}
	return ModeInvalid
}

func (c *checker) failMode(value any, path string) FailMode {
	name := c.oneOf(value, path, "deny", "last_known", "allow")
	for m := FailDeny; m <= FailAllow; m++ {
		if m.String() == name {
			return m
		}
	}
	return FailDeny
}

// known refuses names that are neither empty nor functions of the policy.
func (c *checker) known(policy *Policy, path string, names ...string) {
	for _, name := range names {
		if name != "" && c.err == nil && policy.Functions[name] == nil {
			c.fail("%s: %q is not a function of the policy", path, name)
		}
	}
}

func (c *checker) policy(document any) *Policy {
	top := c.object(document, "the policy",
		"format app version mode source_sha256 on_unavailable peers entries functions app_cfg", "")
	if c.err != nil {
		return nil
	}
	c.oneOf(top["format"], "format", Format)
	policy := &Policy{
		App:          c.name(top["app"], "app"),
		Version:      int(c.integer(top["version"], "version", 1, 1<<31-1)),
		SourceSHA256: c.text(top["source_sha256"], "source_sha256", 64),
		Peers:        map[string]Peer{},
		Entries:      map[string]bool{},
		Functions:    map[string]*Function{},
		invokes:      map[edgeOfApp]bool{},
		invoked:      map[string]bool{},
	}
	policy.Mode = c.mode(top["mode"], "mode")
	if on := c.object(top["on_unavailable"], "on_unavailable", "app_edge deadline_ms", ""); on != nil {
		policy.AppEdge = c.failMode(on["app_edge"], "on_unavailable.app_edge")
		policy.DeadlineMS = int(c.integer(on["deadline_ms"], "on_unavailable.deadline_ms", 1, deadlineMSMax))
	}
	for name, value := range c.names(top["peers"], "peers", peersMax) {
		policy.Peers[name] = c.peer(name, value)
	}
	for name, value := range c.names(top["functions"], "functions", functionsMax) {
		policy.Functions[name] = c.function(policy, name, value)
	}
	for _, element := range c.list(top["entries"], "entries", functionsMax) {
		name := c.name(element, "entries")
		if c.err == nil && (policy.Entries[name] || policy.Functions[name] == nil) {
			c.fail("entries: %q appears twice or is not a function of the policy", name)
		}
		policy.Entries[name] = true
	}
	for name, function := range policy.Functions {
		if function == nil {
			break // it was refused
		}
		for i := range function.Symbols {
			c.known(policy, "functions."+name+".symbols", function.Symbols[i].Callee, function.Symbols[i].Callback)
		}
	}
	c.appCFG(policy, top["app_cfg"])
	return policy
}

func (c *checker) peer(name string, value any) Peer {
	path := "peers." + name
	fields := c.object(value, path, "host port protocol", "role schema")
	if fields == nil {
		return Peer{}
	}
	peer := Peer{
		Name:     name,
		Host:     c.name(fields["host"], path+".host"),
		Port:     uint16(c.integer(fields["port"], path+".port", 1, 65535)),
		Protocol: c.oneOf(fields["protocol"], path+".protocol", ProtocolHTTP, ProtocolHTTPS, ProtocolMySQL, ProtocolSMTP),
	}
	if peer.Host != strings.ToLower(peer.Host) || strings.HasSuffix(peer.Host, ".") {
		c.fail("%s.host is not in lower case without a final dot", path)
	}
	if role, there := fields["role"]; there {
		c.oneOf(role, path+".role", "gateway")
		peer.Gateway = true
		if peer.Protocol != ProtocolHTTP {
			c.fail("%s: a gateway is spoken to in http", path)
		}
	}
	schema, there := fields["schema"]
	if there != (peer.Protocol == ProtocolMySQL) {
		c.fail("%s: a schema belongs to every mysql peer and to no other", path)
	}
	if there {
		peer.Schema = c.name(schema, path+".schema")
	}
	return peer
}

// automatonFields are what any automaton consists of.
const automatonFields = "symbols states start accept edges"

func (c *checker) function(policy *Policy, name string, value any) *Function {
	path := "functions." + name
	fields := c.object(value, path, automatonFields+" max_body invocation_timeout_ms mode tls tail_ms quiet_ms retire_ms max_inflight reuse",
		"startup")
	if fields == nil {
		return nil
	}
	milliseconds := func(field string) int { return int(c.integer(fields[field], path+"."+field, 1, timeoutMSMax)) }
	function := &Function{
		Name:                name,
		MaxBody:             c.integer(fields["max_body"], path+".max_body", 0, bodyBytesMax),
		InvocationTimeoutMS: milliseconds("invocation_timeout_ms"),
		Mode:                c.mode(fields["mode"], path+".mode"),
		Terminate:           c.oneOf(fields["tls"], path+".tls", "open", "terminate") == "terminate",
		TailMS:              milliseconds("tail_ms"),
		QuietMS:             milliseconds("quiet_ms"),
		RetireMS:            milliseconds("retire_ms"),
		MaxInflight:         int(c.integer(fields["max_inflight"], path+".max_inflight", 1, inflightMax)),
		ReuseNever:          c.oneOf(fields["reuse"], path+".reuse", "always", "never") == "never",
	}
	c.automaton(policy, function, fields, path)
	for i := range function.Symbols {
		if symbol := &function.Symbols[i]; symbol.Tail && symbol.Kind == KindInvoke {
			c.fail("%s.symbols[%d] is an invocation after the answer", path, i)
		}
	}
	if startup, there := fields["startup"]; there {
		function.Startup = c.startup(policy, function, startup, path+".startup")
	}
	return function
}

// startup reads the automaton of what is sent before the first request. No call is there yet that an invocation could
// belong to.
func (c *checker) startup(policy *Policy, of *Function, value any, path string) *Function {
	fields := c.object(value, path, automatonFields, "")
	if fields == nil {
		return nil
	}
	startup := &Function{Name: of.Name, MaxBody: of.MaxBody, Mode: of.Mode, Terminate: of.Terminate}
	c.automaton(policy, startup, fields, path)
	for i := range startup.Symbols {
		if symbol := &startup.Symbols[i]; symbol.Tail || symbol.Kind == KindInvoke {
			c.fail("%s.symbols[%d] is an invocation or of the tail", path, i)
		}
	}
	return startup
}

func (c *checker) automaton(policy *Policy, function *Function, fields map[string]any, path string) {
	function.States = int(c.integer(fields["states"], path+".states", 1, statesMax))
	for i, element := range c.list(fields["symbols"], path+".symbols", symbolsMax) {
		function.Symbols = append(function.Symbols, c.symbol(policy, fmt.Sprintf("%s.symbols[%d]", path, i), element))
	}
	function.start = c.states(fields["start"], path+".start", function.States)
	function.accept = c.states(fields["accept"], path+".accept", function.States)
	if c.err == nil && len(function.start.States()) == 0 {
		c.fail("%s.start is empty", path)
	}
	c.edges(function, fields["edges"], path+".edges")
}

func (c *checker) states(value any, path string, states int) Cursor {
	cursor := newCursor(states)
	last := int64(-1)
	for _, element := range c.list(value, path, states) {
		state := c.integer(element, path, last+1, int64(states)-1)
		if c.err != nil {
			return cursor
		}
		cursor.set(int(state))
		last = state
	}
	return cursor
}

func (c *checker) edges(function *Function, value any, path string) {
	function.first = make([]int32, function.States+1)
	for _, triple := range c.triples(value, path, function.States, len(function.Symbols)) {
		function.edges = append(function.edges, edge{symbol: int32(triple[1]), to: int32(triple[2])})
		function.first[triple[0]+1]++
	}
	for state := range function.States {
		function.first[state+1] += function.first[state]
	}
}

// triples reads edges as [from, label, to] in strictly rising order, so that they have one spelling and no duplicates.
func (c *checker) triples(value any, path string, states, labels int) [][3]int64 {
	list := c.list(value, path, edgesMax)
	triples := make([][3]int64, 0, len(list))
	last := [3]int64{-1, -1, -1}
	for i, element := range list {
		triple := c.list(element, path, 3)
		if c.err == nil && len(triple) != 3 {
			c.fail("%s[%d] does not have three parts", path, i)
		}
		if c.err != nil {
			return nil
		}
		now := [3]int64{
			c.integer(triple[0], path, 0, int64(states)-1),
			c.integer(triple[1], path, 0, int64(labels)-1),
			c.integer(triple[2], path, 0, int64(states)-1),
		}
		if c.err == nil && !rising(last, now) {
			c.fail("%s[%d] is not after the one before it", path, i)
		}
		if c.err != nil {
			return nil
		}
		last = now
		triples = append(triples, now)
	}
	return triples
}

func rising(a, b [3]int64) bool {
	for i := range a {
		if a[i] != b[i] {
			return a[i] < b[i]
		}
	}
	return false
}

func (c *checker) symbol(policy *Policy, path string, value any) Symbol {
	object, _ := value.(map[string]any)
	kindName, _ := object["kind"].(string)
	kind := kindOf(kindName)
	if kind == KindUnknown {
		c.fail("%s has no known kind", path)
		return Symbol{}
	}
	fields := c.object(value, path, "kind peer line text tail "+fieldsOf[kind], "")
	if fields == nil {
		return Symbol{}
	}
	symbol := Symbol{
		Kind: kind,
		Peer: c.name(fields["peer"], path+".peer"),
		Line: int(c.integer(fields["line"], path+".line", 0, 1<<31-1)),
		Text: c.text(fields["text"], path+".text", MessageTextMax),
		Tail: c.boolean(fields["tail"], path+".tail"),
	}
	if symbol.Text == "" || Printable(symbol.Text, MessageTextMax) != symbol.Text {
		c.fail("%s.text is not a printable text", path)
	}
	peer, listed := policy.Peers[symbol.Peer]
	if !listed {
		c.fail("%s.peer %q is not listed", path, symbol.Peer)
	}
	switch kind {
	case KindHTTP, KindHTTPS:
		if peer.Protocol != kind.String() || peer.Gateway {
			c.fail("%s: peer %q is not one that is reached by %s requests", path, symbol.Peer, kind)
		}
		symbol.Method = c.name(fields["method"], path+".method")
		if symbol.Method != strings.ToUpper(symbol.Method) {
			c.fail("%s.method is not in upper case", path)
		}
		symbol.Path = c.text(fields["path"], path+".path", MessageTextMax)
		symbol.segments = c.segments(symbol.Path, path+".path")
		symbol.Query = c.sortedNames(fields["query"], path+".query")
		symbol.Retries = int(c.integer(fields["retries"], path+".retries", 0, retriesMax))
		symbol.Upgrade = c.boolean(fields["upgrade"], path+".upgrade")
		symbol.GRPC = c.boolean(fields["grpc"], path+".grpc")
		if symbol.Upgrade && (symbol.GRPC || symbol.Method != "GET") || symbol.GRPC && (kind != KindHTTPS || symbol.Method != "POST") {
			c.fail("%s: an upgrade is a GET, and gRPC is POST over https", path)
		}
	case KindInvoke:
		if !peer.Gateway {
			c.fail("%s: peer %q has not the role gateway", path, symbol.Peer)
		}
		symbol.Callee = c.name(fields["callee"], path+".callee")
		symbol.Asynchronous, symbol.Callback = c.result(fields, path)
		symbol.Retries = int(c.integer(fields["retries"], path+".retries", 0, retriesMax))
	case KindMySQL:
		if peer.Protocol != ProtocolMySQL {
			c.fail("%s: peer %q does not speak mysql", path, symbol.Peer)
		}
		symbol.Verb = c.name(fields["verb"], path+".verb")
		if c.err == nil && !verbs[symbol.Verb] {
			c.fail("%s.verb %q is unknown", path, symbol.Verb)
		}
		symbol.Read = c.sortedNames(fields["read"], path+".read")
		symbol.Write = c.sortedNames(fields["write"], path+".write")
	case KindSMTP:
		if peer.Protocol != ProtocolSMTP {
			c.fail("%s: peer %q does not speak smtp", path, symbol.Peer)
		}
		symbol.From = c.text(fields["from"], path+".from", nameBytesMax)
		symbol.To = c.sortedNames(fields["to"], path+".to")
		for _, address := range symbol.To {
			c.address(address, path+".to")
		}
		if symbol.From != "" {
			c.address(symbol.From, path+".from")
		}
	}
	return symbol
}

// fieldsOf are the fields of a symbol's kind beside those that all have.
var fieldsOf = map[Kind]string{
	KindHTTP: "method path query retries upgrade grpc", KindHTTPS: "method path query retries upgrade grpc",
	KindInvoke: "callee asynchronous callback retries", KindMySQL: "verb read write", KindSMTP: "from to",
}

// result reads how an invocation's result comes: through the queue or not, and to which function. Only what is not waited
// for has a callback.
func (c *checker) result(fields map[string]any, path string) (asynchronous bool, callback string) {
	asynchronous = c.boolean(fields["asynchronous"], path+".asynchronous")
	if fields["callback"] != "" {
		callback = c.name(fields["callback"], path+".callback")
	}
	if callback != "" && !asynchronous {
		c.fail("%s: a callback of an invocation that is waited for", path)
	}
	return asynchronous, callback
}

// address checks a mail address in the one spelling that the parser of mails reports: local@domain without quotes, the
// domain in lower case.
func (c *checker) address(address, path string) {
	c.checkName(address, path)
	local, domain, _ := strings.Cut(address, "@")
	if local == "" || domain == "" || domain != strings.ToLower(domain) || strings.ContainsAny(address, "<>,") || strings.Contains(domain, "@") {
		c.fail("%s: %q is no address in the spelling local@domain", path, address)
	}
}

// segments splits a path template. Literal segments hold only what an accepted request's path can hold, so that no
// line of a policy is silently dead.
func (c *checker) segments(path, where string) []segment {
	if !strings.HasPrefix(path, "/") {
		c.fail("%s does not begin with a slash", where)
		return nil
	}
	parts := strings.Split(path[1:], "/")
	if len(parts) > listMax {
		c.fail("%s has more than %d segments", where, listMax)
		return nil
	}
	segments := make([]segment, 0, len(parts))
	for i, part := range parts {
		switch {
		case strings.HasPrefix(part, "{") && strings.HasSuffix(part, "}") && len(part) > 2 && !strings.ContainsAny(part[1:len(part)-1], "{}"):
			segments = append(segments, segment{any: true})
		case part == "" && i < len(parts)-1, part == ".", part == "..", strings.ContainsFunc(part, notInPaths):
			c.fail("%s: segment %q cannot be in a request's path", where, part)
			return nil
		default:
			segments = append(segments, segment{literal: part})
		}
	}
	return segments
}

// notInPaths tells the characters that no path of an accepted request has: those that wire/http1 refuses in paths.
func notInPaths(r rune) bool {
	return (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && (r < '0' || r > '9') && !strings.ContainsRune("-._~!$&'()*+,=:@", r)
}

// label is what an edge of an app CFG carries: an invocation, or a barrier that the controller takes by itself.
type label struct {
	callee, callback       string
	asynchronous           bool
	retries, join, barrier int64
}

// appCFG is executed by the controller. Here its form and its names are checked, because a document that the controller
// would refuse must not be in force on this side either, and its edges are kept without their order.
func (c *checker) appCFG(policy *Policy, value any) {
	graphs := c.names(value, "app_cfg", functionsMax)
	if c.err == nil && len(graphs) != len(policy.Functions) {
		c.fail("app_cfg has %d functions, functions has %d", len(graphs), len(policy.Functions))
	}
	for name, graph := range graphs {
		path := "app_cfg." + name
		if c.err == nil && policy.Functions[name] == nil {
			c.fail("%s is not a function of the policy", path)
		}
		fields := c.object(graph, path, "states start labels edges", "")
		if fields == nil {
			return
		}
		states := int(c.integer(fields["states"], path+".states", 1, statesMax))
		c.states(fields["start"], path+".start", states)
		labels := c.labels(policy, fields["labels"], path+".labels")
		for _, triple := range c.triples(fields["edges"], path+".edges", states, len(labels)) {
			l := labels[triple[1]]
			if l.barrier != 0 {
				continue
			}
			policy.invokes[edgeOfApp{name, l.callee}] = true
			policy.invoked[l.callee] = true
			if l.callback != "" {
				policy.invoked[l.callback] = true
			}
		}
	}
}

func (c *checker) labels(policy *Policy, value any, path string) []label {
	list := c.list(value, path, labelsMax)
	labels, seen := make([]label, 0, len(list)), map[label]bool{}
	for i, element := range list {
		l := c.label(policy, fmt.Sprintf("%s[%d]", path, i), element)
		if c.err == nil && seen[l] {
			c.fail("%s has one twice", path)
		}
		seen[l] = true
		labels = append(labels, l)
	}
	return labels
}

func (c *checker) label(policy *Policy, path string, value any) label {
	object, _ := value.(map[string]any)
	if _, there := object["barrier"]; there {
		if fields := c.object(value, path, "barrier", ""); fields != nil {
			return label{barrier: c.integer(fields["barrier"], path+".barrier", 1, labelsMax)}
		}
		return label{}
	}
	fields := c.object(value, path, "callee asynchronous callback retries join", "")
	if fields == nil {
		return label{}
	}
	l := label{callee: c.name(fields["callee"], path+".callee")}
	l.asynchronous, l.callback = c.result(fields, path)
	c.known(policy, path, l.callee, l.callback)
	l.retries = c.integer(fields["retries"], path+".retries", 0, retriesMax)
	l.join = c.integer(fields["join"], path+".join", 0, labelsMax)
	return l
}
