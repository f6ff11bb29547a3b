package mediation

var filesystems = []Line{
	{Name: "cgroupfs.Name", Class: Inside, Way: "control groups of the host", Note: "gVisor's own, in the Sentry"},
	{Name: "dev.Name", Class: Inside},
	{Name: "devpts.Name", Class: Inside},
	{Name: "devtmpfs.Name", Class: Inside},
	{Name: "erofs.Name", Class: Inside, Way: "an image of the host", Note: "only read"},
	{Name: "fuse.Name", Class: Inside, Note: "served by a process of the sandbox"},
	{Name: "gofer.Name", Class: Inside, Way: "files of the host", Note: "the root under a layer of its own, and the mounts that start.go allows; no program can mount it", Test: "runtime/internal/sentry/table_test.go::TestFilesAreNoWayOut"},
	{Name: "mqfs.Name", Class: Inside},
	{Name: "overlay.Name", Class: Inside, Note: "over other lines of this table"},
	{Name: "proc.Name", Class: Inside, Way: "/proc/PID/fd", Note: "opens no socket; /proc/sys/net is the sandbox's own"},
	{Name: "sys.Name", Class: Inside},
	{Name: "tmpfs.Name", Class: Inside, Note: "memory of the sandbox"},
}

var devices = []Line{
	{Name: "pkg/sentry/devices/memdev", Class: Inside, Note: "null, zero, full, random, urandom"},
	{Name: "pkg/sentry/devices/ttydev", Class: Inside, Note: "the terminal of the sandbox"},
	{Name: "pkg/sentry/devices/tundev", Class: Refused, Way: "a tunnel: packets that the program writes itself", Note: "its ioctls are refused; without them nothing is read or written", Test: "runtime/internal/sentry/table_test.go::TestTheTableHoldsInside"},
	{Name: "pkg/sentry/fsimpl/fuse", Class: Inside, Note: "served by a process of the sandbox"},
	{Name: "pkg/sentry/devices/nvproxy", Class: Refused, Way: "a device of the host", Note: "by flag, by annotation and by the list of devices"},
	{Name: "pkg/sentry/devices/nvproxy/nvconf", Class: Refused, Way: "a device of the host", Note: "as nvproxy"},
	{Name: "pkg/sentry/devices/tpuproxy", Class: Refused, Way: "a device of the host", Note: "as nvproxy"},
	{Name: "pkg/sentry/devices/tpuproxy/util", Class: Refused, Way: "a device of the host", Note: "as nvproxy"},
	{Name: "pkg/sentry/devices/tpuproxy/accel", Class: Refused, Way: "a device of the host", Note: "as nvproxy"},
	{Name: "pkg/sentry/devices/tpuproxy/vfio", Class: Refused, Way: "a device of the host", Note: "gVisor registers it for /dev/vfio whatever its flags say, so the list of devices refuses the path"},
}

var files = []Line{
	{Name: "a volume shared with another instance", Class: Refused, Way: "what one writes the other reads", Note: "see bind mounts", Test: "runtime/internal/sentry/start_test.go::TestMountsThatAnotherInstanceMayReadAreRefused"},
	{Name: "a FIFO on a mount", Class: Refused, Way: "a process of the host at its other end", Note: "--host-fifo", Test: "runtime/internal/sentry/table_test.go::TestFilesAreNoWayOut"},
	{Name: "a Unix socket on a mount", Class: Refused, Way: "a process of the host that listens", Note: "--host-uds", Test: "runtime/internal/sentry/table_test.go::TestFilesAreNoWayOut"},
	{Name: "a Unix socket that the sandbox binds on a mount", Class: Refused, Way: "a process of the host that connects", Note: "--host-uds", Test: "runtime/internal/sentry/table_test.go::TestFilesAreNoWayOut"},
	{Name: "a read-only mount, mounted again writable", Class: Refused, Way: "what one writes the other reads", Note: "the host's mount is read-only itself", Test: "runtime/internal/sentry/table_test.go::TestFilesAreNoWayOut"},
	{Name: "/proc/PID/fd of a socket", Class: Refused, Way: "a second descriptor that nobody knows", Note: "ENXIO, as on Linux", Test: "runtime/internal/sentry/table_test.go::TestFilesAreNoWayOut"},
	{Name: "/proc/PID/root, /proc/PID/cwd", Class: Inside, Note: "of the sandbox's own processes"},
	{Name: "memfd, tmpfs, /dev/shm", Class: Inside, Note: "memory of the sandbox, or a folder of this container's"},
	{Name: "SCM_RIGHTS", Class: EndsAtEndpoint, Way: "a descriptor in another process", Note: "it is the same endpoint", Test: "tests/integration/test_ways_out.py::test_a_marker_leaves_stock_gvisor_and_no_enforced_sandbox"},
	{Name: "dup, fork, exec", Class: EndsAtEndpoint, Way: "a descriptor in another process", Note: "it is the same endpoint", Test: "tests/integration/test_ways_out.py::test_a_marker_leaves_stock_gvisor_and_no_enforced_sandbox"},
	{Name: "a descriptor that changes while a call runs", Class: EndsAtEndpoint, Way: "the check sees one file and the call another", Note: "nothing looks a descriptor up before the call", Test: "runtime/internal/sentry/race_test.go::TestAChangedDescriptorIsNoWayOut"},
	{Name: "names, times and sizes of files on read-only mounts", Class: Inside, Note: "not changed by reading: the host mounts them read-only"},
}
