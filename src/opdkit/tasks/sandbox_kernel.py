"""The system calls that sandboxed Python code may make, as a seccomp filter: everything else is refused by the kernel.

An allow list: a system call that is new in some kernel is refused until somebody thought about it. What is allowed
cannot leave the process (no sockets but a connected pair, no programs, no processes, no signals to others) and acts on
files only through calls that Landlock judges.

Left out: other systems than Linux on x86-64 and 64-bit ARM (`system_call_filter` gives None), and applying the filter,
which the child does.
"""

import platform
import struct
import sys

# Numbers on x86-64 and, after the colon, on 64-bit ARM; a call without a number there does not exist there.
_ALLOWED = """
read 0:63 write 1:64 readv 19:65 writev 20:66 pread64 17:67 pwrite64 18:68 preadv 295:69 pwritev 296:70 lseek 8:62
close 3:57 close_range 436:436 dup 32:23 dup2 33: dup3 292:24 pipe 22: pipe2 293:59 sendfile 40:71
stat 4: fstat 5:80 lstat 6: newfstatat 262:79 statx 332:291 access 21: faccessat 269:48 faccessat2 439:439
statfs 137:43 fstatfs 138:44 getdents64 217:61 readlink 89: readlinkat 267:78 getcwd 79:17 chdir 80:49 fchdir 81:50
rename 82: renameat 264:38 renameat2 316:276 mkdir 83: mkdirat 258:34 rmdir 84: link 86: linkat 265:37 unlink 87:
unlinkat 263:35 symlink 88: symlinkat 266:36 umask 95:166 ftruncate 77:46 fallocate 285:47 fadvise64 221:223
flock 73:32 fsync 74:82 fdatasync 75:83 copy_file_range 326:285
mmap 9:222 mprotect 10:226 munmap 11:215 mremap 25:216 madvise 28:233 mincore 27:232 msync 26:227 brk 12:214
rt_sigaction 13:134 rt_sigprocmask 14:135 rt_sigreturn 15:139 rt_sigsuspend 130:133 rt_sigpending 127:136
rt_sigtimedwait 128:137 sigaltstack 131:132 pause 34: restart_syscall 219:128
poll 7: ppoll 271:73 select 23: pselect6 270:72 epoll_create 213: epoll_create1 291:20 epoll_ctl 233:21 epoll_wait 232:
epoll_pwait 281:22 eventfd2 290:19 timerfd_create 283:85 timerfd_settime 286:86 timerfd_gettime 287:87
gettimeofday 96:169 time 201: times 100:153 clock_gettime 228:113 clock_getres 229:114 clock_nanosleep 230:115
nanosleep 35:101 getitimer 36:102 setitimer 38:103 alarm 37: getrandom 318:278 sysinfo 99:179 uname 63:160
getpid 39:172 getppid 110:173 getpgrp 111: getpgid 121:155 getsid 124:156 gettid 186:178 getuid 102:174 geteuid 107:175
getgid 104:176 getegid 108:177 getgroups 115:158 getresuid 118:148 getresgid 120:150 getrlimit 97:163 getrusage 98:165
futex 202:98 set_robust_list 273:99 get_robust_list 274:100 rseq 334:293 set_tid_address 218:96 arch_prctl 158:
membarrier 324:283 sched_yield 24:124 sched_getaffinity 204:123 getcpu 309:168 exit 60:93 exit_group 231:94
sendto 44:206 recvfrom 45:207 shutdown 48:210 getsockname 51:204 getsockopt 55:209
kill 62:129 tgkill 234:131 prlimit64 302:261 clone 56:220 open 2: openat 257:56 ioctl 16:29 fcntl 72:25 socketpair 53:199
"""

_ALL = 0xFFFFFFFF
_THREAD = 0x10000  # CLONE_THREAD
# O_TRUNC on a file opened for reading: Landlock before its third version does not see that this writes.
_OPEN = (0o1003, (0o0, 0o1, 0o2, 0o1001, 0o1002))  # of O_TRUNC and the access mode, everything but that
_IOCTL = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)  # TCGETS, window size, FIONREAD, FIONBIO, close on exec
# Not F_SETOWN, which can send a signal to any process, nor F_SETPIPE_SZ, which takes kernel memory.
_FCNTL = (0, 1, 2, 3, 4, 5, 6, 7, 36, 37, 38, 1030, 1032)  # duplicates, flags, locks, F_GETPIPE_SZ

_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000  # SECCOMP_RET_*
_EPERM, _ENOSYS = 1, 38
_NEW = 424  # from here on numbers are common to all machines, and libc tries newer calls and falls back on ENOSYS
_LOAD, _AND, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x54, 0x15, 0x35, 0x06  # classic BPF


def system_call_filter(pid: int) -> bytes | None:
    """The seccomp filter for the process `pid` as an array of sock_filter; None where there is none for this machine."""
    machine = platform.machine()
    if sys.platform != "linux" or machine not in _AUDIT_ARCH or sys.maxsize < 2**32:
        return None
    checks = _checks(pid)
    program = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, _AUDIT_ARCH[machine]), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, 0)]
    for name, number in _numbers(machine).items():
        body = [step for check in checks.get(name, ()) for step in _check(*check)] + [(_RETURN, 0, 0, _ALLOW)]
        program += [(_EQUAL, 0, len(body), number), *body]
    # Numbers from 2^30 on are x86-64's 32-bit interface, with other meanings.
    program += [(_AT_LEAST, 0, 2, _NEW), (_AT_LEAST, 1, 0, 1 << 30), (_RETURN, 0, 0, _ERRNO | _ENOSYS)]
    program += [(_RETURN, 0, 0, _ERRNO | _EPERM)]
    return b"".join(struct.pack("HBBI", *step) for step in program)


def _numbers(machine: str) -> dict[str, int]:
    words = _ALLOWED.split()
    column = list(_AUDIT_ARCH).index(machine)
    pairs = zip(words[::2], (numbers.split(":")[column] for numbers in words[1::2]), strict=True)
    return {name: int(number) for name, number in pairs if number}


def _checks(pid: int) -> dict[str, tuple[tuple[int, int, tuple[int, ...]], ...]]:
    """System call -> (argument, mask, values): allowed only if for each of them the masked argument is one of the values."""
    return {
        "kill": ((0, _ALL, (pid,)),),
        "tgkill": ((0, _ALL, (pid,)),),
        "prlimit64": ((0, _ALL, (0, pid)),),
        "clone": ((0, _THREAD, (_THREAD,)),),
        "open": ((1, *_OPEN),),
        "openat": ((2, *_OPEN),),
        "ioctl": ((1, _ALL, _IOCTL),),
        "fcntl": ((1, _ALL, _FCNTL),),
        "socketpair": ((0, _ALL, (1,)), (1, _ALL & ~0o2004000, (1,))),  # AF_UNIX, SOCK_STREAM: asyncio needs a pair
    }


def _check(argument: int, mask: int, values: tuple[int, ...]) -> list[tuple[int, int, int, int]]:
    """Go on after this if the argument's low half is one of the values; the kernel reads no more of these arguments."""
    equal = [(_EQUAL, len(values) - i, 0, value) for i, value in enumerate(values)]
    return [(_LOAD, 0, 0, 16 + 8 * argument), (_AND, 0, 0, mask), *equal, (_RETURN, 0, 0, _ERRNO | _EPERM)]
