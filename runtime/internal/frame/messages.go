package frame

import "kalium.dev/kalium/runtime/internal/policy"

// Type is the number of a frame's message.
type Type uint8

// The messages of docs/reference/protocol.md.
const (
	TypeHello             Type = 1
	TypeWelcome           Type = 2
	TypeStart             Type = 3
	TypeInvoke            Type = 4
	TypeAnswer            Type = 5
	TypeEnd               Type = 6
	TypeVerdict           Type = 7
	TypePolicy            Type = 8
	TypeLease             Type = 9
	TypeNames             Type = 10
	TypeTimes             Type = 11
	TypeFinish            Type = 12
	TypeMode              Type = 13
	TypeAgentHello        Type = 20
	TypeControllerWelcome Type = 21
	TypeRegister          Type = 22
	TypeUnregister        Type = 23
	TypeStatus            Type = 24
	TypeStatusAnswer      Type = 25
	TypePing              Type = 26
	TypePong              Type = 27
	TypeReport            Type = 28
)

// Message is one of the structs below.
type Message interface {
	Type() Type
	record
}

// Hello opens a guard's session. What it says is compared with the registration of the instance and then forgotten.
// Its id comes back in the Welcome.
type Hello struct {
	Protos    []int // that the guard speaks
	Container string
	App       string
	Function  string
}

// Welcome answers Hello with the same id. When OK is false the other fields are empty.
type Welcome struct {
	OK         bool
	Reason     string // "" when OK
	Proto      int    // the version that both speak
	Policy     []byte // signed envelope
	LeaseMS    int
	Names      map[string][]string // host -> IPv4 addresses
	Port       int                 // on which invocations arrive
	Sources    []string            // CIDRs from which they may come
	HealthPath string
	Roots      []byte // certificates in PEM, by which the guard checks servers; empty unless the policy ends the function's TLS in it
}

// Identity is what the agent adds to a guard's question from its registration. Empty between guard and agent.
type Identity struct{ Instance, App, Function string }

func (i *Identity) fields() []field {
	return []field{{"app", &i.App}, {"function", &i.Function}, {"instance", &i.Instance}}
}

// Start asks for an invocation of the instance's own function.
type Start struct {
	Step     string // 16 hexadecimal digits; the same step asked again gets the stored answer
	Token    string // "" when the request carried none
	Label    string // X-Call-Id of the request, for logs only
	Version  int    // of the guard's policy
	Identity Identity
}

// Invoke asks whether an invocation may invoke Callee.
type Invoke struct {
	Step       string
	Call       string
	Invocation string
	Callee     string
	Version    int
	// Asynchronous: by the gateway's queue; Callback is the function that its result goes to, "" for none. Retry: the
	// same edge once more, because the connection of the last one ended without a byte of an answer.
	Asynchronous bool
	Callback     string
	Retry        bool
	Identity     Identity
}

// Answer answers Start, Invoke, Finish and Register with the same id.
type Answer struct {
	Allowed    bool
	Reason     string // one of policy.Reasons
	Call       string // Start granted: 32 hexadecimal digits
	Invocation string // Start granted: 32 hexadecimal digits
	Token      string // Invoke granted: 32 hexadecimal digits
	Expected   []string
	Detail     string // for people
	Callback   string // Invoke granted: the token of the callback that it asked for
	Hold       bool   // Start granted: the last byte of the answer waits until Finish is answered
}

// End says that an invocation is over. It is never answered.
type End struct {
	Call       string
	Invocation string
	Outcome    string // answered, closed or timeout
	Identity   Identity
}

// Finish is an End that is answered: what a Start with Hold ends by.
type Finish struct {
	Call       string
	Invocation string
	Outcome    string // answered, closed or timeout
	Identity   Identity
}

// Mode says which mode is in force in the sandbox and by which version, whenever either changes.
type Mode struct {
	Mode    string
	Version int
}

// Verdict carries one line of the verdict log.
type Verdict struct{ Record VerdictRecord }

// VerdictRecord is the guard's part of a line; the agent adds time_ms, seq, node, instance, app and function.
type VerdictRecord struct {
	Event         string // EventVerdict
	Mode          string
	PolicyVersion int
	Call          string
	Invocation    string
	Kind          string // start, connect, name, http, https, mysql, smtp, invoke, incoming, other
	Message       string
	Peer          string
	Allowed       bool
	WouldDeny     bool
	Reason        string // one of policy.Reasons
	Expected      []string
	Line          int
	States        []int
	Judging       string
	LatencyUS     int
	FailMode      string // "", or by which an app edge was decided without the controller: deny, allow or last_known
}

// EventVerdict is the only event of a VerdictRecord.
const EventVerdict = "verdict"

// Policy brings a new version of an app's policy.
type Policy struct {
	App    string
	Policy []byte // signed envelope
}

// Lease renews the right to decide locally for LeaseMS from its arrival on.
type Lease struct{ LeaseMS int }

// Names replaces the addresses of the listed hosts.
type Names struct{ Names map[string][]string }

// Times carries measurements of judged messages. The lists are equally long, and a message has its place in each of
// them. Spans are nanoseconds, and -1 where the phase cannot occur for that message.
type Times struct {
	Dropped    int      // samples that found no room since the last Times
	Invocation []string // "" for a message that no invocation is known of
	Kind       []string // as in VerdictRecord, and "off" for bytes that passed unseen
	Bytes      []int    // of the judged unit as the program meant it: of TLS, the plaintext
	Record     []int
	Open       []int
	Event      []int
	Local      []int
	Controller []int
	Total      []int
	Reseal     []int
}

// spans are the lists of which every element is a span.
func (m *Times) spans() [7][]int {
	return [...][]int{m.Record, m.Open, m.Event, m.Local, m.Controller, m.Total, m.Reseal}
}

// AgentHello opens an agent's session.
type AgentHello struct {
	Node string
	Run  string // 16 hexadecimal digits, drawn anew at each start of the agent
	// Connection counts the connections of this run, to whichever controllers: a question that arrives late over an
	// older one is no question any more.
	Connection int
	Protos     []int // that the agent speaks
}

// ControllerWelcome answers AgentHello with the same id. Policies that do not fit follow as Policy.
type ControllerWelcome struct {
	OK         bool
	Reason     string
	Proto      int    // the version that both speak
	Controller string // the name of who answers
	LeaseMS    int
	Policies   map[string][]byte // app -> signed envelope
}

// Register announces an instance on the agent's node.
type Register struct {
	Instance string
	App      string
	Function string
	Image    string
}

// Unregister says that an instance is gone. It is never answered.
type Unregister struct{ Instance string }

// Ping asks whether the controller is there. It is told when nothing else was heard for a while.
type Ping struct{}

// Pong answers Ping with the same id.
type Pong struct{}

// Report says what a node runs, and what its agent has counted since its start. The lists are equally long: Count instances
// of Function whose guards say that Mode is in force by Version; an instance without a guard has the mode "none". Keys of the
// maps are an app and a reason or fail mode, with a space between.
type Report struct {
	AuditSeq  int    // of the last line of the agent's audit log
	AuditHash string // likewise
	App       []string
	Function  []string
	Mode      []string
	Version   []int
	Count     []int
	Denied    map[string]int
	WouldDeny map[string]int
	FailModes map[string]int
}

// Status asks the controller for StatusAnswer.
type Status struct{}

// StatusAnswer answers Status with the same id.
type StatusAnswer struct{ Status StatusReport }

// StatusReport counts what a controller holds. The lists from Node to Count are equally long: what the agents reported last,
// and in Asked the mode that the newest policy wants.
type StatusReport struct {
	Policies    map[string]int // app -> version
	Agents      int
	Calls       int
	Invocations int
	Controller  string
	Controllers []string // that share its store
	Store       string   // memory or redis
	StartedMS   int      // since 1970
	Node        []string
	App         []string
	Function    []string
	Asked       []string
	Mode        []string
	Version     []int
	Count       []int
	Denied      map[string]int
	WouldDeny   map[string]int
	FailModes   map[string]int
	Evicted     map[string]int
}

// Type implements Message.Type.
func (*Hello) Type() Type { return TypeHello }

// Type implements Message.Type.
func (*Welcome) Type() Type { return TypeWelcome }

// Type implements Message.Type.
func (*Start) Type() Type { return TypeStart }

// Type implements Message.Type.
func (*Invoke) Type() Type { return TypeInvoke }

// Type implements Message.Type.
func (*Answer) Type() Type { return TypeAnswer }

// Type implements Message.Type.
func (*End) Type() Type { return TypeEnd }

// Type implements Message.Type.
func (*Verdict) Type() Type { return TypeVerdict }

// Type implements Message.Type.
func (*Policy) Type() Type { return TypePolicy }

// Type implements Message.Type.
func (*Lease) Type() Type { return TypeLease }

// Type implements Message.Type.
func (*Names) Type() Type { return TypeNames }

// Type implements Message.Type.
func (*Times) Type() Type { return TypeTimes }

// Type implements Message.Type.
func (*Finish) Type() Type { return TypeFinish }

// Type implements Message.Type.
func (*Mode) Type() Type { return TypeMode }

// Type implements Message.Type.
func (*Ping) Type() Type { return TypePing }

// Type implements Message.Type.
func (*Pong) Type() Type { return TypePong }

// Type implements Message.Type.
func (*Report) Type() Type { return TypeReport }

// Type implements Message.Type.
func (*AgentHello) Type() Type { return TypeAgentHello }

// Type implements Message.Type.
func (*ControllerWelcome) Type() Type { return TypeControllerWelcome }

// Type implements Message.Type.
func (*Register) Type() Type { return TypeRegister }

// Type implements Message.Type.
func (*Unregister) Type() Type { return TypeUnregister }

// Type implements Message.Type.
func (*Status) Type() Type { return TypeStatus }

// Type implements Message.Type.
func (*StatusAnswer) Type() Type { return TypeStatusAnswer }

// kinds has one line for every message: how to make an empty one, and whether its id correlates it with another.
var kinds = map[Type]struct {
	make       func() Message
	correlated bool
}{
	TypeHello:             {func() Message { return new(Hello) }, true},
	TypeWelcome:           {func() Message { return new(Welcome) }, true},
	TypeStart:             {func() Message { return new(Start) }, true},
	TypeInvoke:            {func() Message { return new(Invoke) }, true},
	TypeAnswer:            {func() Message { return new(Answer) }, true},
	TypeEnd:               {func() Message { return new(End) }, false},
	TypeVerdict:           {func() Message { return new(Verdict) }, false},
	TypePolicy:            {func() Message { return new(Policy) }, false},
	TypeLease:             {func() Message { return new(Lease) }, false},
	TypeNames:             {func() Message { return new(Names) }, false},
	TypeTimes:             {func() Message { return new(Times) }, false},
	TypeFinish:            {func() Message { return new(Finish) }, true},
	TypeMode:              {func() Message { return new(Mode) }, false},
	TypeAgentHello:        {func() Message { return new(AgentHello) }, true},
	TypeControllerWelcome: {func() Message { return new(ControllerWelcome) }, true},
	TypeRegister:          {func() Message { return new(Register) }, true},
	TypeUnregister:        {func() Message { return new(Unregister) }, false},
	TypeStatus:            {func() Message { return new(Status) }, true},
	TypeStatusAnswer:      {func() Message { return new(StatusAnswer) }, true},
	TypePing:              {func() Message { return new(Ping) }, true},
	TypePong:              {func() Message { return new(Pong) }, true},
	TypeReport:            {func() Message { return new(Report) }, false},
}

// The lists below are sorted by name; TestFieldsAreSorted holds it.

func (m *Hello) fields() []field {
	return []field{{"app", &m.App}, {"container", &m.Container}, {"function", &m.Function}, {"protos", &m.Protos}}
}

func (m *Welcome) fields() []field {
	return []field{
		{"health_path", &m.HealthPath}, {"lease_ms", &m.LeaseMS}, {"names", &m.Names}, {"ok", &m.OK},
		{"policy", &m.Policy}, {"port", &m.Port}, {"proto", &m.Proto}, {"reason", &m.Reason}, {"roots", &m.Roots},
		{"sources", &m.Sources},
	}
}

func (m *Start) fields() []field {
	return []field{{"label", &m.Label}, {"step", &m.Step}, {"token", &m.Token}, {"version", &m.Version}}
}

func (m *Invoke) fields() []field {
	return []field{
		{"asynchronous", &m.Asynchronous}, {"call", &m.Call}, {"callback", &m.Callback}, {"callee", &m.Callee},
		{"invocation", &m.Invocation}, {"retry", &m.Retry}, {"step", &m.Step}, {"version", &m.Version},
	}
}

func (m *Answer) fields() []field {
	return []field{
		{"allowed", &m.Allowed}, {"call", &m.Call}, {"callback", &m.Callback}, {"detail", &m.Detail}, {"expected", &m.Expected},
		{"hold", &m.Hold}, {"invocation", &m.Invocation}, {"reason", &m.Reason}, {"token", &m.Token},
	}
}

func (m *End) fields() []field {
	return []field{{"call", &m.Call}, {"invocation", &m.Invocation}, {"outcome", &m.Outcome}}
}

func (m *Finish) fields() []field {
	return []field{{"call", &m.Call}, {"invocation", &m.Invocation}, {"outcome", &m.Outcome}}
}

func (m *Mode) fields() []field { return []field{{"mode", &m.Mode}, {"version", &m.Version}} }

func (m *Verdict) fields() []field { return []field{{"record", &m.Record}} }

func (r *VerdictRecord) fields() []field {
	return []field{
		{"allowed", &r.Allowed}, {"call", &r.Call}, {"event", &r.Event}, {"expected", &r.Expected},
		{"fail_mode", &r.FailMode}, {"invocation", &r.Invocation}, {"judging", &r.Judging}, {"kind", &r.Kind}, {"latency_us", &r.LatencyUS},
		{"line", &r.Line}, {"message", &r.Message}, {"mode", &r.Mode}, {"peer", &r.Peer},
		{"policy_version", &r.PolicyVersion}, {"reason", &r.Reason}, {"states", &r.States}, {"would_deny", &r.WouldDeny},
	}
}

func (m *Policy) fields() []field { return []field{{"app", &m.App}, {"policy", &m.Policy}} }

func (m *Lease) fields() []field { return []field{{"lease_ms", &m.LeaseMS}} }

func (m *Names) fields() []field { return []field{{"names", &m.Names}} }

func (m *Times) fields() []field {
	return []field{
		{"bytes", &m.Bytes}, {"controller", &m.Controller}, {"dropped", &m.Dropped}, {"event", &m.Event},
		{"invocation", &m.Invocation}, {"kind", &m.Kind}, {"local", &m.Local}, {"open", &m.Open}, {"record", &m.Record},
		{"reseal", &m.Reseal}, {"total", &m.Total},
	}
}

func (m *AgentHello) fields() []field {
	return []field{{"connection", &m.Connection}, {"node", &m.Node}, {"protos", &m.Protos}, {"run", &m.Run}}
}

func (m *ControllerWelcome) fields() []field {
	return []field{
		{"controller", &m.Controller}, {"lease_ms", &m.LeaseMS}, {"ok", &m.OK}, {"policies", &m.Policies}, {"proto", &m.Proto},
		{"reason", &m.Reason},
	}
}

func (m *Register) fields() []field {
	return []field{{"app", &m.App}, {"function", &m.Function}, {"image", &m.Image}, {"instance", &m.Instance}}
}

func (m *Unregister) fields() []field { return []field{{"instance", &m.Instance}} }

func (*Status) fields() []field { return nil }

func (*Ping) fields() []field { return nil }

func (*Pong) fields() []field { return nil }

func (m *Report) fields() []field {
	return []field{
		{"app", &m.App}, {"audit_hash", &m.AuditHash}, {"audit_seq", &m.AuditSeq}, {"count", &m.Count}, {"denied", &m.Denied},
		{"fail_modes", &m.FailModes}, {"function", &m.Function}, {"mode", &m.Mode}, {"version", &m.Version},
		{"would_deny", &m.WouldDeny},
	}
}

func (m *StatusAnswer) fields() []field { return []field{{"status", &m.Status}} }

func (r *StatusReport) fields() []field {
	return []field{
		{"agents", &r.Agents}, {"app", &r.App}, {"asked", &r.Asked}, {"calls", &r.Calls}, {"controller", &r.Controller},
		{"controllers", &r.Controllers}, {"count", &r.Count}, {"denied", &r.Denied}, {"evicted", &r.Evicted},
		{"fail_modes", &r.FailModes}, {"function", &r.Function}, {"invocations", &r.Invocations}, {"mode", &r.Mode},
		{"node", &r.Node}, {"policies", &r.Policies}, {"started_ms", &r.StartedMS}, {"store", &r.Store},
		{"version", &r.Version}, {"would_deny", &r.WouldDeny},
	}
}

// identified is a message that has a second shape between agent and controller.
type identified interface{ identity() *Identity }

func (m *Start) identity() *Identity  { return &m.Identity }
func (m *Invoke) identity() *Identity { return &m.Identity }
func (m *End) identity() *Identity    { return &m.Identity }
func (m *Finish) identity() *Identity { return &m.Identity }

const identityFields = 3

// withIdentity merges the fields of the identity into the other ones of an identified message: its second shape.
func withIdentity(plain []field, i *Identity) []field {
	whole := make([]field, 0, len(plain)+identityFields)
	for _, f := range i.fields() {
		for len(plain) > 0 && plain[0].name < f.name {
			whole = append(whole, plain[0])
			plain = plain[1:]
		}
		whole = append(whole, f)
	}
	return append(whole, plain...)
}

// check holds what the types of the fields do not say.
func check(m Message) error {
	switch m := m.(type) {
	case *Start:
		return stepAllowed(m.Step)
	case *Invoke:
		return stepAllowed(m.Step)
	case *Answer:
		return reasonAllowed(m.Reason)
	case *Verdict:
		if m.Record.Event != EventVerdict {
			return broken("event %q of a verdict record", m.Record.Event)
		}
		if err := failModeAllowed(m.Record.FailMode); err != nil {
			return err
		}
		return reasonAllowed(m.Record.Reason)
	case *Times:
		return timesAllowed(m)
	case *End:
		return outcomeAllowed(m.Outcome)
	case *Finish:
		return outcomeAllowed(m.Outcome)
	case *AgentHello:
		return stepAllowed(m.Run)
	case *Report:
		return equallyLong(len(m.App), len(m.Function), len(m.Mode), len(m.Version), len(m.Count))
	case *StatusAnswer:
		r := &m.Status
		return equallyLong(len(r.Node), len(r.App), len(r.Function), len(r.Asked), len(r.Mode), len(r.Version), len(r.Count))
	}
	return nil
}

func outcomeAllowed(outcome string) error {
	if outcome != "answered" && outcome != "closed" && outcome != "timeout" {
		return broken("outcome %q", outcome)
	}
	return nil
}

func failModeAllowed(mode string) error {
	if mode != "" && mode != "deny" && mode != "allow" && mode != "last_known" {
		return broken("fail mode %q", mode)
	}
	return nil
}

func equallyLong(lengths ...int) error {
	for _, n := range lengths {
		if n != lengths[0] {
			return broken("columns that are not equally long")
		}
	}
	return nil
}

func timesAllowed(m *Times) error {
	n := len(m.Kind)
	if len(m.Invocation) != n || len(m.Bytes) != n {
		return broken("lists of times that are not equally long")
	}
	for _, list := range m.spans() {
		if len(list) != n {
			return broken("lists of times that are not equally long")
		}
		for _, span := range list {
			if span < -1 {
				return broken("a span of %d ns", span)
			}
		}
	}
	return nil
}

func stepAllowed(step string) error {
	if len(step) != StepBytes {
		return broken("a step of %d bytes, not %d", len(step), StepBytes)
	}
	for i := range len(step) {
		if c := step[i]; (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return broken("byte %#02x in a step", c)
		}
	}
	return nil
}

func reasonAllowed(reason string) error {
	if !policy.Reason(reason).Known() {
		return broken("reason %q", reason)
	}
	return nil
}
