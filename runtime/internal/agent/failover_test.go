package agent

import (
	"fmt"
	"math/rand/v2"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"kalium.dev/kalium/runtime/internal/frame"
)

// proxy stands between an agent and a controller. While it is a hole it takes bytes and gives none on, and says nothing of
// it: what a network does that was cut.
type proxy struct {
	t        *testing.T
	target   string
	listener net.Listener
	hole     atomic.Bool
	serving  sync.WaitGroup

	mu    sync.Mutex
	conns []net.Conn // guarded by mu
}

func newProxy(t *testing.T, target string) *proxy {
	t.Helper()
	p := &proxy{t: t, target: target, listener: must(net.Listen("tcp", "127.0.0.1:0"))}
	t.Cleanup(func() {
		_ = p.listener.Close()
		p.mu.Lock()
		for _, conn := range p.conns {
			_ = conn.Close()
		}
		p.mu.Unlock()
		p.serving.Wait()
	})
	p.serving.Go(func() {
		for {
			conn, err := p.listener.Accept()
			if err != nil {
				return
			}
			p.keep(conn)
			there, err := net.Dial("tcp", p.target)
			if err != nil {
				_ = conn.Close()
				continue
			}
			p.keep(there)
			p.serving.Go(func() { p.copy(conn, there) })
			p.serving.Go(func() { p.copy(there, conn) })
		}
	})
	return p
}

func (p *proxy) keep(conn net.Conn) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.conns = append(p.conns, conn)
}

func (p *proxy) copy(from, to net.Conn) {
	buffer := make([]byte, 64*1024)
	for {
		n, err := from.Read(buffer)
		if p.hole.Load() {
			if err != nil {
				return // nobody hears of the end either
			}
			continue
		}
		if err == nil {
			_, err = to.Write(buffer[:n])
		}
		if err != nil {
			_ = to.Close()
			return
		}
	}
}

// two is a site with two controllers that share a store, and a proxy in front of each.
func two(t *testing.T) (s *site, store *fakeStore, controllers [2]*fakeController, proxies [2]*proxy) {
	t.Helper()
	s, store = newSite(t), newFakeStore()
	controllers = [2]*fakeController{s.controller, s.another()}
	for i, c := range controllers {
		c.store = store
		c.offer("shop", s.sign(compiled("shop", 1)))
		c.start()
		proxies[i] = newProxy(t, c.address)
		s.config.Controllers[i].Address = proxies[i].listener.Addr().String()
	}
	s.start()
	s.untilConnected()
	return s, store, controllers, proxies
}

// connected is the index of the controller that the agent is connected to.
func (s *site) connected() int {
	s.t.Helper()
	for i, c := range *s.status().Controllers {
		if c.Connected {
			return i
		}
	}
	return -1
}

func (s *site) status() *result {
	s.t.Helper()
	answer, err := askStatus(s.config.RegisterSocket)
	if err != nil {
		s.t.Fatal(err)
	}
	return answer
}

func TestASilentControllerIsReplacedWithinASecond(t *testing.T) {
	t.Parallel()
	var best time.Duration
	for attempt := range 3 { // the machine may be busy with something else: the best one counts
		s, store, controllers, proxies := two(t)
		g := s.guard("c1", "pay")
		first := s.connected()
		answered := make(chan struct{})
		begin := time.Now()

		proxies[first].hole.Store(true)
		go func() {
			defer close(answered)
			g.send(1, &frame.Start{Step: step, Version: 1}) // into the hole
			if id, answer := g.answer(); id != 1 || !answer.Allowed {
				t.Errorf("id %d, %#v", id, answer)
			}
		}()
		<-answered

		took := time.Since(begin)
		if best == 0 || took < best {
			best = took
		}
		s.until("the next one is connected", func() bool { return s.connected() == 1-first })
		if store.times(step) != 1 || len(store.strange) != 0 {
			t.Errorf("asked %d times; %v", store.asked[step], store.strange)
		}
		for _, c := range controllers {
			c.stop()
		}
		if best <= time.Second {
			t.Logf("a network that is cut without a word: answered by the next controller after %v (attempt %d)", took, attempt)
			return
		}
	}
	t.Errorf("it took %v", best)
}

func TestAnAnswerThatWasLostIsTheStoredOne(t *testing.T) {
	t.Parallel()
	s, store, controllers, _ := two(t)
	g := s.guard("c1", "pay")
	first := controllers[s.connected()]
	// The controller decides, and dies before its answer is written.
	first.with(func() { first.store = nil })
	g.send(1, &frame.Start{Step: step, Version: 1})
	r, m := expect[*frame.Start](first)
	decided := store.decide(r.conn, m.Step, m.Identity.Instance)

	first.stop()

	if id, answer := g.answer(); id != 1 || answer.Invocation != decided.Invocation {
		t.Errorf("id %d, %#v", id, answer)
	}
	if store.times(step) != 2 {
		t.Errorf("asked %d times", store.times(step))
	}
}

func TestTheNextControllerIsTriedAtOnceAndKept(t *testing.T) {
	t.Parallel()
	s, _, controllers, _ := two(t)
	g := s.guard("c1", "pay")
	first := s.connected()

	begin := time.Now()
	controllers[first].stop()
	g.send(1, &frame.Start{Step: step, Version: 1})
	_, answer := g.answer()
	took := time.Since(begin)

	if !answer.Allowed {
		t.Errorf("%#v", answer)
	}
	s.until("the next one is connected", func() bool { return s.connected() == 1-first })
	t.Logf("a controller that was killed: answered by the next one after %v", took)
	controllers[first].start()
	g.send(2, &frame.Start{Step: "0123456789abcde0", Version: 1})
	if _, answer := g.answer(); !answer.Allowed || s.connected() != 1-first {
		t.Errorf("once the first one is back: %#v by %d", answer, s.connected())
	}
}

func TestWithNoControllerLeftQuestionsAreDeniedAfterASecond(t *testing.T) {
	t.Parallel()
	s, _, controllers, _ := two(t)
	g := s.guard("c1", "pay")
	for _, c := range controllers {
		c.with(func() { c.store = nil })
	}
	g.send(1, &frame.Start{Step: step, Version: 1})
	expect[*frame.Start](controllers[s.connected()])
	begin := time.Now()

	controllers[0].stop()
	controllers[1].stop()

	if id, answer := g.answer(); id != 1 || answer.Reason != "controller_unavailable" {
		t.Errorf("id %d, %#v", id, answer)
	}
	if took := time.Since(begin); took < parkMax/2 {
		t.Errorf("denied after %v", took)
	}
	var best time.Duration
	for attempt := range uint32(3) { // the machine may be busy with something else: the best one counts
		begin = time.Now()
		g.send(2+attempt, &frame.Start{Step: step, Version: 1})
		if id, answer := g.answer(); id != 2+attempt || answer.Reason != "controller_unavailable" {
			t.Errorf("after that second: id %d, %#v", id, answer)
		}
		if took := time.Since(begin); attempt == 0 || took < best {
			best = took
		}
	}
	if best > parkMax/2 {
		t.Errorf("after that second: denied after %v", best)
	}
}

func TestARegistrationOutlivesItsController(t *testing.T) {
	t.Parallel()
	s, store, controllers, _ := two(t)
	first := controllers[s.connected()]
	first.with(func() { first.silent = true })
	answer := make(chan string, 1)
	go func() { answer <- s.ask(registerLine("c1", "shop", "pay")) }()
	expect[*frame.Register](first)

	first.stop()

	if got := <-answer; got != `{"ok":true}` {
		t.Fatal(got)
	}
	g, welcome := s.hello("c1", "shop", "pay")
	if !welcome.OK {
		t.Fatalf("%#v", welcome)
	}
	g.send(1, &frame.Start{Step: step, Version: 1})
	if _, answer := g.answer(); !answer.Allowed || len(store.said()) != 0 {
		t.Errorf("%#v, %v", answer, store.said())
	}
}

func TestAnEndReachesTheNextController(t *testing.T) {
	t.Parallel()
	s, store, controllers, proxies := two(t)
	g := s.guard("c1", "pay")
	first := s.connected()

	// Written to a connection that nobody reads any more, and told while none is there: both are told again.
	proxies[first].hole.Store(true)
	g.send(0, &frame.End{Call: "c", Invocation: "in the hole", Outcome: "answered"})
	s.until("the next controller is told", func() bool { return store.ends("in the hole") == 1 && s.connected() == 1-first })
	controllers[0].stop()
	controllers[1].stop()
	s.until("the agent has noticed", func() bool { return s.connected() < 0 })
	g.send(0, &frame.End{Call: "c", Invocation: "while away", Outcome: "answered"})
	proxies[first].hole.Store(false)
	controllers[first].start()

	s.until("it is told", func() bool { return store.ends("while away") == 1 })
}

func TestAnEndThatWasReadIsNotToldAgain(t *testing.T) {
	t.Parallel()
	s, store, controllers, _ := two(t)
	g := s.guard("c1", "pay")
	g.send(0, &frame.End{Call: "c", Invocation: "i", Outcome: "answered"})
	g.send(1, &frame.Start{Step: step, Version: 1})
	g.answer() // so what was in front of the question was read

	controllers[s.connected()].stop()
	g.send(2, &frame.Start{Step: "0123456789abcde0", Version: 1})
	g.answer()

	if n := store.ends("i"); n != 1 {
		t.Errorf("told %d times", n)
	}
}

func TestUntoldEndsAreBounded(t *testing.T) {
	l := &link{count: &metrics{}}
	for i := range endsMax + 2 {
		l.ended(&frame.End{Invocation: fmt.Sprint(i)})
	}

	if len(l.untold) != endsMax || l.untold[0].Invocation != "2" || l.forgotten != 2 {
		t.Errorf("%d are kept from %s on, %d forgotten", len(l.untold), l.untold[0].Invocation, l.forgotten)
	}
}

func TestFlappingControllersAreNotHammered(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	second := s.another()
	var hellos atomic.Int64
	done := make(chan struct{})
	var begin time.Time
	for _, c := range []*fakeController{s.controller, second} {
		c.start()
		go func() {
			for {
				select {
				case r := <-c.received:
					if _, hello := r.m.(*frame.AgentHello); hello {
						if hellos.Add(1) == 8 {
							close(done)
						}
						// Its answer goes out under the lock: welcomed, and dropped at once.
						c.with(func() { _ = r.conn.Close() })
					}
				case <-t.Context().Done():
					return
				}
			}
		}()
	}
	begin = time.Now()

	s.start()

	select {
	case <-done:
	case <-time.After(patience):
		t.Fatal("the agent has given up")
	}
	// The second one is tried at once; then it waits for at least 25, 50, 100 and three times 125 ms.
	if took := time.Since(begin); took < 500*time.Millisecond {
		t.Errorf("8 connections in %v", took)
	}
}

func TestTheOrderOfControllersIsDrawnOnceForARun(t *testing.T) {
	config := &Config{}
	for i := range 3 {
		config.Controllers = append(config.Controllers, Controller{Address: fmt.Sprint("host:", i)})
	}
	firsts := map[string]int{}
	for range 300 {
		l := newLink(config, "", nil, &metrics{}, nil)
		firsts[l.order[0].Address]++
		if sorted := slices.SortedFunc(slices.Values(l.order), func(a, b Controller) int { return strings.Compare(a.Address, b.Address) }); !slices.Equal(sorted, config.Controllers) {
			t.Fatalf("%v", l.order)
		}
		if l.silence != silenceAmongOthers {
			t.Fatalf("silence of %v", l.silence)
		}
	}
	for i := range 3 {
		if n := firsts[fmt.Sprint("host:", i)]; n < 50 {
			t.Errorf("controller %d is first %d times of 300", i, n)
		}
	}
	config.Controllers = config.Controllers[:1]
	if l := newLink(config, "", nil, &metrics{}, nil); l.silence != silenceAlone {
		t.Errorf("silence of %v with one controller", l.silence)
	}
}

func TestAStolenKeyIsSaidAndTriedAgain(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	s.controller.no = "duplicate_agent"
	s.controller.start()
	s.start()

	s.until("the agent says so", func() bool {
		return strings.Contains(s.log.String(), "level=ERROR event="+eventDuplicateAgent) && strings.Contains(s.log.String(), "stolen")
	})
	s.controller.with(func() { s.controller.no = "" })
	s.untilConnected()
}

// TestRubbishNeverAllows has one controller that answers rubbish, of every kind, and one that does not.
func TestRubbishNeverAllows(t *testing.T) {
	t.Parallel()
	rubbish := map[string]func(c *fakeController, r received){
		"an answer to another question": func(c *fakeController, r received) {
			c.send(r.conn, r.id+1000, &frame.Answer{Allowed: true, Reason: "allowed", Call: "c", Invocation: "rubbish"})
		},
		"a contradiction": func(c *fakeController, r received) {
			c.send(r.conn, r.id, &frame.Answer{Allowed: true, Reason: "bad_token", Invocation: "rubbish"})
		},
		"a pong to a question": func(c *fakeController, r received) { c.send(r.conn, r.id, &frame.Pong{}) },
		"the question":         func(c *fakeController, r received) { c.send(r.conn, r.id, r.m) },
		"half an answer": func(_ *fakeController, r received) {
			whole := must(frame.Append(nil, r.id, &frame.Answer{Allowed: true, Reason: "allowed", Invocation: "rubbish"}))
			_, _ = r.conn.Write(whole[:len(whole)-1])
			_ = r.conn.Close()
		},
		"an unknown reason": func(_ *fakeController, r received) {
			whole := must(frame.Append(nil, r.id, &frame.Answer{Allowed: true, Reason: "allowed", Invocation: "rubbish"}))
			_, _ = r.conn.Write([]byte(strings.Replace(string(whole), "\xa7allowed\xa5", "\xa7allowes\xa5", 1)))
		},
		"noise": func(_ *fakeController, r received) {
			_, _ = r.conn.Write([]byte{'K', 'L', 1, 5, 0, 0, 0, byte(r.id), 0, 0, 0, 4, 0x81, 0xff, 0xff, 0xff})
		},
	}
	for name, answer := range rubbish {
		t.Run(name, func(t *testing.T) {
			s, store, controllers, _ := two(t)
			g := s.guard("c1", "pay")
			bad := controllers[s.connected()]
			bad.with(func() { bad.store = nil })
			g.send(1, &frame.Start{Step: step, Version: 1})
			r, _ := expect[*frame.Start](bad)

			answer(bad, r)

			if id, got := g.answer(); id != 1 || !got.Allowed || got.Invocation != "invocation-"+step || store.times(step) != 1 {
				t.Errorf("id %d, %#v, asked %d times", id, got, store.times(step))
			}
		})
	}
}

func TestASecondAnswerIsNobodys(t *testing.T) {
	t.Parallel()
	s, _, controllers, _ := two(t)
	g := s.guard("c1", "pay")
	bad := controllers[s.connected()]
	bad.with(func() { bad.store = nil })
	g.send(1, &frame.Start{Step: step, Version: 1})
	r, _ := expect[*frame.Start](bad)
	bad.send(r.conn, r.id, &frame.Answer{Reason: "bad_token"})
	bad.send(r.conn, r.id, &frame.Answer{Allowed: true, Reason: "allowed", Invocation: "late"})
	if id, answer := g.answer(); id != 1 || answer.Allowed {
		t.Errorf("id %d, %#v", id, answer)
	}

	g.send(2, &frame.Start{Step: "0123456789abcde0", Version: 1})

	if id, answer := g.answer(); id != 2 || answer.Invocation != "invocation-0123456789abcde0" { // by the other controller
		t.Errorf("id %d, %#v", id, answer)
	}
}

func TestTooManyQuestionsAreNotTheControllersFault(t *testing.T) {
	start := func() *question {
		return &question{m: &frame.Start{Step: step}, max: 2, done: func(*frame.Answer) {}}
	}
	away := &link{count: &metrics{}, parkUntil: time.Now().Add(time.Hour)}
	open := &link{count: &metrics{}, conn: &linkConn{pending: map[uint32]*question{}, sender: sender{err: errClosed}}}
	for name, l := range map[string]*link{"parked": away, "asked": open} {
		for range 2 {
			if refused := l.ask(start()); refused != "" {
				t.Fatalf("%s: %s", name, refused)
			}
		}
		if refused := l.ask(start()); refused != "overloaded" {
			t.Errorf("%s: %s", name, refused)
		}
	}
	if refused := (&link{count: &metrics{}}).ask(start()); refused != "controller_unavailable" {
		t.Errorf("without a controller: %s", refused)
	}
}

// TestFailOverUnderLoad lets guards ask at once while controllers die one after the other, in each of the ways they can.
func TestFailOverUnderLoad(t *testing.T) {
	t.Parallel()
	const guards, atOnce, faultsMax = 12, 4, 12
	s, store, controllers, proxies := two(t)
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	var asking sync.WaitGroup
	var enough atomic.Bool
	var slowest atomic.Int64
	for n := range guards {
		g := s.guard(fmt.Sprint("c", n), "pay")
		asking.Go(func() { g.load(n, atOnce, &enough, &slowest) })
	}
	faults := map[string]int{}
	for n := range faultsMax {
		steps := store.steps()
		s.until("questions are answered", func() bool { return store.steps() > steps+10*guards })
		first := -1
		s.until("one is connected", func() bool { first = s.connected(); return first >= 0 })
		switch kind := (n + random.IntN(2)) % 3; kind {
		case 0:
			faults["killed"]++
			controllers[first].stop()
			s.until("the next one is connected", func() bool { return s.connected() == 1-first })
			controllers[first].start()
		case 1:
			faults["cut"]++
			proxies[first].hole.Store(true)
			s.until("the next one is connected", func() bool { return s.connected() == 1-first })
			proxies[first].hole.Store(false)
		case 2:
			faults["dropped"]++
			controllers[first].with(func() {
				for _, conn := range controllers[first].conns {
					_ = conn.Close()
				}
			})
			s.until("the next one is connected", func() bool { return s.connected() == 1-first })
		}
	}
	enough.Store(true)
	asking.Wait()
	s.until("every end is told", func() bool {
		store.mu.Lock()
		defer store.mu.Unlock()
		for _, answer := range store.answers {
			if answer.Allowed && store.ended[answer.Invocation] == 0 {
				return false
			}
		}
		return true
	})
	store.mu.Lock()
	defer store.mu.Unlock()
	if len(store.strange) != 0 {
		t.Errorf("%d times: %s", len(store.strange), store.strange[0])
	}
	allowed, repeated := 0, 0
	for step, answer := range store.answers {
		if store.asked[step] > 1 {
			repeated++
		}
		if answer.Allowed {
			allowed++
		}
	}
	if repeated == 0 {
		t.Error("no question was open when a controller died")
	}
	t.Logf("%d steps, %d allowed, %d asked again; faults %v; slowest answer %v", len(store.answers), allowed, repeated, faults, time.Duration(slowest.Load()))
}

// load asks questions of which some are to be denied, atOnce at a time, and holds each answer against what the store says.
func (g *fakeGuard) load(n, atOnce int, enough *atomic.Bool, slowest *atomic.Int64) {
	type open struct {
		step  string
		begin time.Time
	}
	asked := map[uint32]open{}
	next := 0
	for !enough.Load() || len(asked) > 0 {
		for !enough.Load() && len(asked) < atOnce {
			next++
			kind := "0"
			if next%5 == 0 {
				kind = "f"
			}
			each := open{fmt.Sprintf("%s%07x%08x", kind, n, next), time.Now()}
			asked[uint32(next)] = each
			if err := g.write(uint32(next), &frame.Start{Step: each.step, Version: 1}); err != nil {
				g.t.Error(err)
				return
			}
		}
		_ = g.conn.SetReadDeadline(time.Now().Add(patience))
		id, m, err := g.reader.next()
		if err != nil {
			g.t.Errorf("guard %d: %v", n, err)
			return
		}
		answer, is := m.(*frame.Answer)
		if !is {
			continue
		}
		each, waits := asked[id]
		if !waits {
			g.t.Errorf("guard %d: an answer to %d, which it does not wait for", n, id)
			return
		}
		delete(asked, id)
		if took := time.Since(each.begin); took > time.Duration(slowest.Load()) {
			slowest.Store(int64(took))
		}
		switch {
		case strings.HasPrefix(each.step, "f") && answer.Reason == "edge_not_allowed":
		case strings.HasPrefix(each.step, "0") && answer.Allowed && answer.Invocation == "invocation-"+each.step:
			if err := g.write(0, &frame.End{Call: answer.Call, Invocation: answer.Invocation, Outcome: "answered"}); err != nil {
				g.t.Error(err)
				return
			}
		default:
			g.t.Errorf("guard %d, step %s: %#v", n, each.step, answer)
			return
		}
	}
}

func (g *fakeGuard) write(id uint32, m frame.Message) error {
	_, err := g.conn.Write(must(frame.Append(nil, id, m)))
	return err
}
