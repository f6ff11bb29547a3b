package mediation

import "gvisor.dev/gvisor/pkg/abi/linux"

// Ioctl is a request of ioctl(2).
type Ioctl struct {
	Number uint32
	Line
}

var ioctls = []Ioctl{
	{linux.FIOASYNC, Line{Name: "FIOASYNC", Class: Inside}},
	{linux.FIOCLEX, Line{Name: "FIOCLEX", Class: Inside}},
	{linux.FIOGETOWN, Line{Name: "FIOGETOWN", Class: Inside}},
	{linux.FIONBIO, Line{Name: "FIONBIO", Class: Inside}},
	{linux.FIONCLEX, Line{Name: "FIONCLEX", Class: Inside}},
	{linux.FIONREAD, Line{Name: "FIONREAD", Class: Inside}},
	{linux.FIOSETOWN, Line{Name: "FIOSETOWN", Class: Inside}},
	{linux.FUSE_DEV_IOC_CLONE, Line{Name: "FUSE_DEV_IOC_CLONE", Class: Inside}},
	{linux.KCOV_DISABLE, Line{Name: "KCOV_DISABLE", Class: Refused, Way: "coverage of the Sentry", Note: "for builds of gVisor that test it"}},
	{linux.KCOV_ENABLE, Line{Name: "KCOV_ENABLE", Class: Refused, Way: "coverage of the Sentry", Note: "for builds of gVisor that test it"}},
	{linux.KCOV_INIT_TRACE, Line{Name: "KCOV_INIT_TRACE", Class: Refused, Way: "coverage of the Sentry", Note: "for builds of gVisor that test it"}},
	{linux.SIOCETHTOOL, Line{Name: "SIOCETHTOOL", Class: Inside}},
	{linux.SIOCGIFADDR, Line{Name: "SIOCGIFADDR", Class: Inside}},
	{linux.SIOCGIFBRDADDR, Line{Name: "SIOCGIFBRDADDR", Class: Inside}},
	{linux.SIOCGIFCONF, Line{Name: "SIOCGIFCONF", Class: Inside}},
	{linux.SIOCGIFDSTADDR, Line{Name: "SIOCGIFDSTADDR", Class: Inside}},
	{linux.SIOCGIFFLAGS, Line{Name: "SIOCGIFFLAGS", Class: Inside}},
	{linux.SIOCGIFHWADDR, Line{Name: "SIOCGIFHWADDR", Class: Inside}},
	{linux.SIOCGIFINDEX, Line{Name: "SIOCGIFINDEX", Class: Inside}},
	{linux.SIOCGIFMAP, Line{Name: "SIOCGIFMAP", Class: Inside}},
	{linux.SIOCGIFMEM, Line{Name: "SIOCGIFMEM", Class: Inside}},
	{linux.SIOCGIFMETRIC, Line{Name: "SIOCGIFMETRIC", Class: Inside}},
	{linux.SIOCGIFMTU, Line{Name: "SIOCGIFMTU", Class: Inside}},
	{linux.SIOCGIFNAME, Line{Name: "SIOCGIFNAME", Class: Inside}},
	{linux.SIOCGIFNETMASK, Line{Name: "SIOCGIFNETMASK", Class: Inside}},
	{linux.SIOCGIFPFLAGS, Line{Name: "SIOCGIFPFLAGS", Class: Inside}},
	{linux.SIOCGIFTXQLEN, Line{Name: "SIOCGIFTXQLEN", Class: Inside}},
	{linux.SIOCGMIIPHY, Line{Name: "SIOCGMIIPHY", Class: Inside}},
	{linux.SIOCGMIIREG, Line{Name: "SIOCGMIIREG", Class: Inside}},
	{linux.SIOCGPGRP, Line{Name: "SIOCGPGRP", Class: Inside}},
	{linux.SIOCGSTAMP, Line{Name: "SIOCGSTAMP", Class: Inside}},
	{linux.SIOCSPGRP, Line{Name: "SIOCSPGRP", Class: Inside}},
	{linux.TCFLSH, Line{Name: "TCFLSH", Class: Inside}},
	{linux.TCGETS, Line{Name: "TCGETS", Class: Inside}},
	{linux.TCSBRK, Line{Name: "TCSBRK", Class: Inside}},
	{linux.TCSBRKP, Line{Name: "TCSBRKP", Class: Inside}},
	{linux.TCSETS, Line{Name: "TCSETS", Class: Inside}},
	{linux.TCSETSF, Line{Name: "TCSETSF", Class: Inside}},
	{linux.TCSETSW, Line{Name: "TCSETSW", Class: Inside}},
	{linux.TIOCCBRK, Line{Name: "TIOCCBRK", Class: Inside}},
	{linux.TIOCCONS, Line{Name: "TIOCCONS", Class: Inside, Way: "the host's console", Note: "gVisor does not pass it on"}},
	{linux.TIOCEXCL, Line{Name: "TIOCEXCL", Class: Inside}},
	{linux.TIOCGDEV, Line{Name: "TIOCGDEV", Class: Inside}},
	{linux.TIOCGETD, Line{Name: "TIOCGETD", Class: Inside}},
	{linux.TIOCGEXCL, Line{Name: "TIOCGEXCL", Class: Inside}},
	{linux.TIOCGICOUNT, Line{Name: "TIOCGICOUNT", Class: Inside}},
	{linux.TIOCGPGRP, Line{Name: "TIOCGPGRP", Class: Inside}},
	{linux.TIOCGPKT, Line{Name: "TIOCGPKT", Class: Inside}},
	{linux.TIOCGPTN, Line{Name: "TIOCGPTN", Class: Inside}},
	{linux.TIOCGPTPEER, Line{Name: "TIOCGPTPEER", Class: Inside}},
	{linux.TIOCGSID, Line{Name: "TIOCGSID", Class: Inside}},
	{linux.TIOCGWINSZ, Line{Name: "TIOCGWINSZ", Class: Inside}},
	{linux.TIOCINQ, Line{Name: "TIOCINQ", Class: Inside}},
	{linux.TIOCMBIC, Line{Name: "TIOCMBIC", Class: Inside}},
	{linux.TIOCMBIS, Line{Name: "TIOCMBIS", Class: Inside}},
	{linux.TIOCMGET, Line{Name: "TIOCMGET", Class: Inside}},
	{linux.TIOCMSET, Line{Name: "TIOCMSET", Class: Inside}},
	{linux.TIOCNOTTY, Line{Name: "TIOCNOTTY", Class: Inside}},
	{linux.TIOCNXCL, Line{Name: "TIOCNXCL", Class: Inside}},
	{linux.TIOCOUTQ, Line{Name: "TIOCOUTQ", Class: Inside}},
	{linux.TIOCPKT, Line{Name: "TIOCPKT", Class: Inside}},
	{linux.TIOCSBRK, Line{Name: "TIOCSBRK", Class: Inside}},
	{linux.TIOCSCTTY, Line{Name: "TIOCSCTTY", Class: Inside}},
	{linux.TIOCSETD, Line{Name: "TIOCSETD", Class: Inside}},
	{linux.TIOCSPGRP, Line{Name: "TIOCSPGRP", Class: Inside}},
	{linux.TIOCSPTLCK, Line{Name: "TIOCSPTLCK", Class: Inside}},
	{linux.TIOCSSERIAL, Line{Name: "TIOCSSERIAL", Class: Inside}},
	{linux.TIOCSTI, Line{Name: "TIOCSTI", Class: Inside, Way: "input of the host's terminal", Note: "gVisor does not pass it on"}},
	{linux.TIOCSWINSZ, Line{Name: "TIOCSWINSZ", Class: Inside}},
	{linux.TIOCVHANGUP, Line{Name: "TIOCVHANGUP", Class: Inside}},
	{linux.TUNGETIFF, Line{Name: "TUNGETIFF", Class: Refused, Way: "a tunnel: packets that the program writes itself"}},
	{linux.TUNSETIFF, Line{Name: "TUNSETIFF", Class: Refused, Way: "a tunnel: packets that the program writes itself"}},
	{linux.TUNSETPERSIST, Line{Name: "TUNSETPERSIST", Class: Refused, Way: "a tunnel: packets that the program writes itself"}},
}

var ioctlsByNumber = func() map[uint32]Class {
	index := make(map[uint32]Class, len(ioctls))
	for _, i := range ioctls {
		index[i.Number] = i.Class
	}
	return index
}()

// IoctlClass returns the class of a request. One without a line has the zero class, which refuses.
func IoctlClass(number uint32) Class { return ioctlsByNumber[number] }

// EachIoctl returns all requests with their numbers.
func EachIoctl() []Ioctl { return append([]Ioctl(nil), ioctls...) }
