package mysql

import (
	"testing"

	"kalium.dev/kalium/runtime/internal/policy"
)

// tls is what a client inside TLS sends: an SSLRequest and then the handshake response.
func tls(change func(*response)) (request, whole []byte) {
	whole = of(func(r *response) {
		r.flags |= clientSSL
		if change != nil {
			change(r)
		}
	}).build()
	request = packet(1, whole[headerBytes:headerBytes+requestBytes]...)
	whole[headerBytes-1] = 2
	return request, whole
}

func TestAClientGoesOnInsideTLS(t *testing.T) {
	c := NewClient("other", "helloRetail")
	c.Server(greetingOf(clientSSL))
	request, whole := tls(func(r *response) { r.flags |= clientMultiStatements })

	start := take(t, c, request)

	if start.Kind != StartTLS || !c.InTLS() || c.Schema() != "" {
		t.Fatalf("%#v, inside %v", start, c.InTLS())
	}
	if u := take(t, c, whole); u.Kind != Support || c.Schema() != "helloRetail" {
		t.Errorf("%#v, schema %q", u, c.Schema())
	}
	clean, _ := tls(nil)
	if string(request) != string(clean) || string(whole[headerBytes:headerBytes+requestBytes]) != string(clean[headerBytes:]) {
		t.Errorf("sent are %x and %x", request, whole)
	}
	take(t, c, packet(4, make([]byte, 20)...))
	if u := take(t, c, query("SELECT a FROM t")); u.Kind != Message {
		t.Errorf("%#v", u)
	}
}

func TestAnSSLRequestThatAServerMightNotUnderstandIsRefused(t *testing.T) {
	plain, _ := tls(nil)
	changed := func(at int, to byte) []byte {
		data := append([]byte(nil), plain...)
		data[headerBytes+at] = to
		return data
	}
	noFlag := of(nil).build()
	for name, c := range map[string]struct {
		greeting, request []byte
		reason            policy.Reason
	}{
		"no greeting was seen":       {nil, plain, policy.ReasonUnsupported},
		"a greeting without TLS":     {greetingOf(clientDeprecateEOF), plain, policy.ReasonUnsupported},
		"half a greeting":            {greetingOf(clientSSL)[:30], plain, policy.ReasonUnsupported},
		"an error for a greeting":    {answers(failure), plain, policy.ReasonUnsupported},
		"a greeting of version 9":    {packet(0, 9, 'x', 0), plain, policy.ReasonUnsupported},
		"a short greeting":           {packet(0, 10, 'x', 0, 1), plain, policy.ReasonUnsupported},
		"a packet numbered 2":        {greetingOf(clientSSL), append([]byte{32, 0, 0, 2}, plain[headerBytes:]...), policy.ReasonMalformed},
		"without the flag":           {greetingOf(clientSSL), packet(1, noFlag[headerBytes:headerBytes+requestBytes]...), policy.ReasonMalformed},
		"with a byte more":           {greetingOf(clientSSL), packet(1, append(append([]byte(nil), plain[headerBytes:]...), 0)...), policy.ReasonUnsupported},
		"with a byte less":           {greetingOf(clientSSL), packet(1, plain[headerBytes:len(plain)-1]...), policy.ReasonMalformed},
		"compression":                {greetingOf(clientSSL), changed(0, plain[headerBytes]|1<<5), policy.ReasonUnsupported},
		"no schema":                  {greetingOf(clientSSL), changed(0, plain[headerBytes]&^clientConnectWithDB), policy.ReasonUnsupported},
		"gbk":                        {greetingOf(clientSSL), changed(8, 28), policy.ReasonUnsupported},
		"a filler that is not zero":  {greetingOf(clientSSL), changed(9, 1), policy.ReasonUnsupported},
		"the handshake that follows": {greetingOf(clientSSL), func() []byte { _, whole := tls(nil); whole[headerBytes-1] = 1; return whole }(), policy.ReasonUnsupported},
	} {
		client := NewClient("helloRetail")
		client.Server(c.greeting)

		t.Run(name, func(t *testing.T) { refuse(t, client, c.request, c.reason) })

		if client.InTLS() {
			t.Errorf("%s: inside TLS", name)
		}
	}
}

func TestAHandshakeInsideTLSSaysWhatItsSSLRequestSaid(t *testing.T) {
	for name, change := range map[string]func(*response){
		"another flag":      func(r *response) { r.flags |= clientInteractive },
		"a flag less":       func(r *response) { r.flags &^= clientFoundRows | clientLongFlag },
		"without TLS":       func(r *response) { r.flags &^= clientSSL },
		"another collation": func(r *response) { r.collation = 46 },
		"MariaDB's flags":   func(r *response) { r.flags, r.filler[19] = r.flags&^clientLongPassword, 1 },
	} {
		c := NewClient("helloRetail")
		c.Server(greetingOf(clientSSL))
		request, _ := tls(nil)
		take(t, c, request)
		_, whole := tls(change)

		t.Run(name, func(t *testing.T) { refuse(t, c, whole, policy.ReasonUnsupported) })
	}
}

func TestASecondSSLRequestIsRefused(t *testing.T) {
	c := NewClient("helloRetail")
	c.Server(greetingOf(clientSSL))
	request, _ := tls(nil)
	take(t, c, request)
	request[headerBytes-1] = 2

	refuse(t, c, request, policy.ReasonMalformed)
}

func TestMariaDBsOwnFlagsPass(t *testing.T) {
	data := of(func(r *response) { r.flags, r.filler[19] = r.flags&^clientLongPassword, allowedMariaDB }).build()

	take(t, NewClient("helloRetail"), data)
}
