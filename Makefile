# Everything but the tests is the one line that builds xchat. CC, CPPFLAGS, CFLAGS,
# LDFLAGS, PREFIX and DESTDIR may be set, from the command line or the environment.
PREFIX = /usr/local
B = test/build
SANITIZE = -g -O1 -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer

xchat: xchat.c
	$(CC) -O2 $(CPPFLAGS) $(CFLAGS) $(LDFLAGS) -o $@ xchat.c -lssl -lcrypto

.PHONY: run test faults asan valgrind cross coverage fuzz prove bench abuse soak install clean
run: xchat
	./xchat

test: xchat
	sh test/run

asan:
	mkdir -p $(B)
	$(CC) $(SANITIZE) -o $(B)/xchat-asan xchat.c -lssl -lcrypto
	XCHAT=$(B)/xchat-asan UNIT_CFLAGS="$(SANITIZE)" XCHAT_SLOW=2 sh test/run

faults: xchat
	FAULT_STEP=1 python3 test/faults.py

valgrind:
	mkdir -p $(B)
	$(CC) -g -O1 -DXCHAT_NO_LANDLOCK -o $(B)/xchat-valgrind xchat.c -lssl -lcrypto
	XCHAT=$(B)/xchat-valgrind XCHAT_SLOW=8 sh test/run --valgrind

coverage:
	python3 test/coverage

cross:
	sh test/cross

fuzz:
	sh test/run --fuzz

prove:
	python3 test/prove

bench:
	python3 test/bench

abuse: xchat
	python3 test/abuse

soak: xchat
	python3 test/soak

install: xchat
	mkdir -p $(DESTDIR)$(PREFIX)/bin
	cp -f xchat $(DESTDIR)$(PREFIX)/bin/xchat

clean:
	rm -rf xchat $(B) test/__pycache__
